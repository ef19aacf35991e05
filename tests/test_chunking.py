"""Chunks: the result of the whole batch however it is cut, within the memory there is, and nothing lost on the way."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import warnings
import weakref
from dataclasses import dataclass

import pytest
import torch
from helpers import Function, draw, mixture, seeded, watched
from torch import nn

import sdekit
from sdekit import _memory, chunking
from sdekit._memory import counted, free_bytes, peak_of, ran_out
from sdekit.chunking import chunked
from sdekit.comparison import log_ratio
from sdekit.discrete import discrete_log_likelihood
from sdekit.sampled_density import sample_log_prob
from sdekit.solution import Path, Stats

VP = sdekit.VPSDE()
CPU = torch.device("cpu")


def close(one, other):
    """The same results to rounding, calls apart: chunks make more of them."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9, equal_nan=True)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            close(one[key], other[key])
    elif isinstance(one, tuple):
        for a, b in zip(one, other, strict=True):
            close(a, b)


class Classes(nn.Module):
    """A network with a class for each sample."""

    def __init__(self, target):
        super().__init__()
        self.net, self.shift = target.score_model(VP).net, 0.2 * draw(1, 3, 2)

    def forward(self, x, label, y):
        return self.net(x, label) + torch.tanh(self.shift[y])


@dataclass(frozen=True)
class Held:
    """A tensor in what is no tuple."""

    x: torch.Tensor


class TestTheResult:
    @pytest.mark.parametrize("chunk", [4, 100, None])
    @pytest.mark.parametrize("divergence", [sdekit.Exact(), sdekit.Hutchinson(2)])
    def test_of_a_likelihood_with_conditions_is_that_of_the_whole(self, divergence, chunk):
        target = mixture(2, 3)
        model = sdekit.ScoreModel(Classes(target), VP, data_std=1.0).condition(y=torch.arange(11) % 3)
        x, options = target.sample(11, generator=seeded(0)), {"divergence": divergence, "nodes": 12, "seed": 3}
        whole = sdekit.log_likelihood(model, x, **options)
        found = chunked(
            lambda part, rows: sdekit.log_likelihood(model.take(rows), part, indices=rows, **options), x, chunk=chunk
        )
        close(found._replace(stats=found.stats._replace(calls=0)), whole._replace(stats=whole.stats._replace(calls=0)))
        assert found.stats.calls >= whole.stats.calls

    @pytest.mark.parametrize("chunk", [3, None])
    def test_of_samples_and_their_paths_is_that_of_the_whole(self, chunk):
        model, indices = mixture(2, 3).score_model(VP), torch.arange(20, 29)

        def drawn(part, rows):
            return sdekit.sample(
                model,
                (len(part), 2),
                indices=part,
                controller=sdekit.PID(1e-3, 1e-3),
                return_path=True,
                dtype=torch.float64,
            )

        whole, found = drawn(indices, None), chunked(drawn, indices, chunk=chunk)
        assert len({int(n) for n in whole.stats.accepted}) > 1  # paths of several lengths
        close(found.path, whole.path)
        close(found.x, whole.x)
        close(found.stats._replace(calls=0), whole.stats._replace(calls=0))

    def test_of_nested_results_is_joined_leaf_by_leaf(self):
        a, b = (mixture(2, seed).score_model(VP) for seed in (3, 4))
        x = mixture(2, 3).sample(5, generator=seeded(0))
        options = {"nodes": 8, "divergence": sdekit.Hutchinson(2)}
        found = chunked(lambda part, rows: log_ratio(a, b, part, indices=rows, **options), x, chunk=2)
        whole = log_ratio(a, b, x, **options)
        close(found.value, whole.value)
        close(found.std_error, whole.std_error)
        close(found.a.by_probe, whole.a.by_probe)
        assert found.a.stats.calls == 3 * 8

    def test_plain_tensors_numbers_and_dictionaries_are_joined_too(self):
        x = draw(1, 7, 2)
        found = chunked(lambda part, rows: (part**2, {"row": rows, "calls": 1}, None), x, chunk=3)
        assert torch.equal(found[0], x**2)
        assert torch.equal(found[1]["row"], torch.arange(7))
        assert found[1]["calls"] == 3
        assert found[2] is None

    @pytest.mark.parametrize(
        ("leaf", "words"),
        [
            (lambda part: [part], "rest of type list"),
            (lambda part: part.numpy(), "rest of type ndarray"),
            (lambda part: Held(part), "rest of type Held"),
            (lambda part: float(part.mean()), "rest that is .* of one chunk and .* of another"),
            (lambda part: str(len(part)), "rest that is '3' of one chunk and '1' of another"),
            (lambda part: part if len(part) == 3 else 1.0, "rest that is a Tensor of one chunk and 1.0 of another"),
        ],
    )
    def test_what_cannot_be_joined_is_refused_by_its_name(self, leaf, words):
        with pytest.raises(TypeError, match=words):
            chunked(lambda part, rows: {"x": part, "rest": leaf(part)}, draw(1, 7, 2), chunk=3)

    def test_what_is_the_same_of_every_chunk_is_kept(self):
        found = chunked(lambda part, rows: (part, float("nan"), "adams", sdekit.VPSDE()), draw(1, 7, 2), chunk=3)
        assert found[1] != found[1]
        assert found[2:] == ("adams", sdekit.VPSDE())

    def test_all_that_was_paid_is_counted(self):
        model = mixture(2, 3).score_model(VP)
        found = chunked(lambda part, rows: sdekit.log_likelihood(model, part, indices=rows), draw(1, 9, 2), chunk=2)
        assert int(found.stats.evaluations.sum()) <= found.stats.paid
        assert found.stats.useful <= 1.0

    def test_of_an_empty_batch_is_that_of_the_function(self):
        model = mixture(2, 3).score_model(VP)
        found = chunked(lambda part, rows: sdekit.log_likelihood(model, part, indices=rows), draw(1, 0, 2))
        assert found.log_prob.shape == (0,)

    def test_progress_changes_nothing(self, capsys):
        x = draw(1, 5, 2)
        assert torch.equal(chunked(lambda part, rows: 2 * part, x, chunk=2, progress=True), 2 * x)
        assert "5/5" in capsys.readouterr().err


class TestMemory:
    def test_the_peak_counts_each_storage_for_as_long_as_it_lives(self):
        x = torch.zeros(1000, dtype=torch.float64)

        def work():
            a = x + 1  # 8,000 bytes
            b = a.reshape(10, 100).T  # a view: nothing
            c = b.contiguous()  # 16,000
            del a, b
            return (c * 2).sum()  # c and 2 c again 16,000, and the sum

        peak = peak_of(work, CPU)[1]
        assert 16_000 <= peak <= 16_100
        again = peak_of(lambda: [x + 1 for _ in range(3)], CPU)[1]
        assert again == 24_000

    def test_the_peak_counts_what_a_backward_pass_keeps_and_batched_products(self):
        x = torch.ones(100, 100, dtype=torch.float64, requires_grad=True)

        def work():
            y = x
            for _ in range(10):
                y = torch.sin(y)
            return torch.autograd.grad(y.sum(), x)[0]

        assert 10 * 80_000 <= peak_of(work, CPU)[1] <= 14 * 80_000
        one, many = (
            peak_of(
                lambda p=p: torch.autograd.grad(
                    torch.sin(x), x, torch.ones(p, 100, 100).double(), is_grads_batched=True
                ),
                CPU,
            )[1]
            for p in (1, 20)
        )
        assert many > 10 * one / 2

    def test_a_view_of_what_was_there_takes_nothing(self):
        weight = torch.zeros(1000, dtype=torch.float64)
        assert peak_of(lambda: weight.reshape(10, 100).T[2:], CPU)[1] == 0
        assert peak_of(lambda: weight.reshape(10, 100).T.contiguous(), CPU)[1] == 8_000

    def test_what_would_not_fit_is_stopped_when_it_does_not(self):
        made = []

        def work():
            for _ in range(10):
                made.append(torch.zeros(1000, dtype=torch.float64))  # 8,000 bytes
            return len(made)

        assert counted(work, 80_000) == (10, 80_000)
        made.clear()
        with pytest.raises(MemoryError, match="40000 bytes") as caught:
            counted(work, 39_999)
        assert ran_out(caught.value)
        assert len(made) == 4

    @pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system does not say what is mapped")
    def test_a_limit_of_the_process_counts(self):
        code = (
            "import resource, torch; from sdekit._memory import free_bytes\n"
            "mapped = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
            "resource.setrlimit(resource.RLIMIT_AS, (mapped + 10**9, -1))\n"
            "print(free_bytes(torch.device('cpu')))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert 0.9e9 < int(done.stdout) <= 1e9

    @pytest.mark.parametrize("divergence", [sdekit.Exact(), sdekit.Hutchinson(4)])
    def test_the_chunk_chosen_stays_within_the_share_and_uses_it(self, monkeypatch, divergence):
        """Of 3 MB at most half is taken, and at the end most of that; half a MB goes to what any solve begins with."""
        monkeypatch.setattr(chunking, "free_bytes", lambda device: 3_000_000)
        layers = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)).double()
        model = sdekit.ScoreModel(Function(lambda x, label: layers(x)), VP)
        peaks, sizes = [], []

        def solve(part, rows):
            found, peak = peak_of(
                lambda: sdekit.log_likelihood(model, part, indices=rows, nodes=5, divergence=divergence), CPU
            )
            peaks.append(peak)
            sizes.append(len(part))
            return found

        found = chunked(solve, draw(1, 300, 16))
        assert found.log_prob.shape == (300,)
        assert sizes[0] == 2
        assert max(peaks) <= 1_500_000
        assert max(peaks) > 0.7 * 1_500_000
        assert sizes[-2] == max(sizes) > 20

    def test_without_room_for_two_samples_go_one_by_one(self, monkeypatch):
        monkeypatch.setattr(chunking, "free_bytes", lambda device: 10)
        sizes = []
        chunked(lambda part, rows: sizes.append(len(part)) or part * 2, draw(1, 6, 3))
        assert sizes == [2, 1, 1, 1, 1]

    @pytest.mark.parametrize("how", ["cpu", "onednn", "cuda", "in a network"])
    def test_a_chunk_that_does_not_fit_is_halved(self, how):
        x, sizes = draw(1, 20, 2), []

        def greedy(state, label=None):
            if len(state) > 3 and how == "cpu":
                torch.empty(2**60, dtype=torch.uint8)
            if len(state) > 3 and how == "onednn":
                raise RuntimeError("could not create a primitive")  # a convolution's own word for it
            if len(state) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return 0.3 * state

        model = sdekit.ScoreModel(Function(greedy), VP)

        def solve(part, rows):
            sizes.append(len(part))
            return (
                sdekit.sample(model, (len(part), 2), indices=rows, steps=2).x if how == "in a network" else greedy(part)
            )

        found = chunked(solve, x, chunk=16)
        wanted = sdekit.sample(sdekit.ScoreModel(Function(lambda x, t: 0.3 * x), VP), (20, 2), steps=2).x
        close(found, wanted if how == "in a network" else 0.3 * x)
        assert sizes == [16, 8, 4, 2] + [2] * 9

    def test_one_sample_that_does_not_fit_is_an_error(self):
        def greedy(part, rows):
            raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.raises(torch.OutOfMemoryError):
            chunked(greedy, draw(1, 8, 2), chunk=8)

    def test_only_what_says_so_is_taken_for_memory_that_ran_out(self):
        assert not ran_out(RuntimeError("the size of tensor a must match"))
        assert ran_out(MemoryError())
        error = RuntimeError("outer")
        error.__cause__ = torch.OutOfMemoryError("inner")
        assert ran_out(error)

    def group(self, place, limit):
        """The files of a control group: limit, use and table."""
        return place / limit, place / "used", place / "stat"

    def test_what_is_free_is_less_than_what_there_is(self, monkeypatch, tmp_path):
        total = _memory.os.sysconf("SC_PAGE_SIZE") * _memory.os.sysconf("SC_PHYS_PAGES")
        assert 0 < free_bytes(CPU) <= total
        for name, text in (("most", "5000"), ("used", "1800"), ("none", "max")):
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(_memory, "_CONTROL_GROUPS", ((*self.group(tmp_path, "most"), "files"),))
        assert free_bytes(CPU) == 3200
        (tmp_path / "stat").write_text("anon 1\nfiles_of_others 9\nfiles 700\n")  # what was read is given back
        assert free_bytes(CPU) == 3900
        monkeypatch.setattr(_memory, "_CONTROL_GROUPS", ((*self.group(tmp_path, "none"), "files"),))
        assert free_bytes(CPU) > 3200

    def test_what_ran_out_of_memory_is_gone_before_the_next_try(self):
        """Errors hold their frames, whose variables hold the errors: cycles, which only the collector opens."""
        alive: list[weakref.ref[torch.Tensor]] = []

        def net(x, label):
            assert all(one() is None for one in alive)
            kept = torch.ones(10)
            alive.append(weakref.ref(kept))
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            alive.clear()
            return 0.0 * x

        model = sdekit.ScoreModel(Function(net), VP)
        gc.disable()
        try:
            found = chunked(
                lambda part, rows: sdekit.log_likelihood(model, part, nodes=3, indices=rows).log_prob,
                draw(1, 8, 2),
                chunk=8,
            )
        finally:
            gc.enable()
        assert found.shape == (8,)

    def test_under_a_real_limit_it_finishes_what_the_whole_does_not(self):
        """A process of limited address space: 64 samples of 8 MB do not fit at once, and do in chunks."""
        code = """
            import resource, torch
            from sdekit.chunking import chunked
            torch.ones(8).sum()
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]))
            x = torch.arange(64.0)
            def work(part, rows):
                return torch.ones(len(part), 2**21).mul_(part[:, None]).mean(1)
            try:
                work(x, None)
            except RuntimeError:
                print("no", end=" ")
            print(torch.equal(chunked(work, x, chunk=64), x))
        """
        if not sys.platform.startswith("linux"):
            pytest.skip("needs /proc")
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            check=False,
            cwd=chunking.__file__[:-19],
            # Threads and arenas reserve address space when they like. So none, and every tensor is mapped and unmapped.
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"},
        )
        assert done.stdout.strip() == "no True", done.stderr


class TestFailures:
    def spoiled(self):
        """A model whose network answers NaN where x is large."""
        net = mixture(2, 3).score_model(VP).net
        return sdekit.ScoreModel(
            Function(lambda x, t: torch.where(x.abs() > 40, torch.nan, net(x, t))), VP, data_std=1.0
        )

    def test_a_failed_sample_raises_after_all_chunks_with_what_the_whole_would_hold(self):
        x = mixture(2, 3).sample(9, generator=seeded(0))
        x[[1, 7]] = 50.0
        model = self.spoiled()
        with pytest.raises(sdekit.SolveError, match=r"sample 1 at(.|\n)*and 1 chunks more") as caught:
            chunked(lambda part, rows: sdekit.log_likelihood(model, part, indices=rows, nodes=8), x, chunk=2)
        kept = caught.value.solution
        whole = sdekit.log_likelihood(model, x, nodes=8, throw=False)
        close(kept.log_prob, whole.log_prob)
        assert kept.log_prob.isnan().tolist() == [k in (1, 7) for k in range(9)]
        assert torch.equal(kept.status, whole.status)

    def test_a_network_that_cannot_be_used_ends_the_work_with_what_there_is(self):
        def stop(call, x, label, answer):
            return answer()[:, :1] if call > 20 else answer()

        model, watch = watched(mixture(2, 3).score_model(VP), stop)
        x = mixture(2, 3).sample(9, generator=seeded(0))
        with pytest.raises(
            sdekit.SolveError, match=r"same shape is needed(.|\n)*3 of 9 samples were not reached"
        ) as caught:
            chunked(lambda part, rows: sdekit.log_likelihood(model, part, indices=rows, nodes=8), x, chunk=2)
        kept = caught.value.solution
        assert watch.calls == 21
        assert kept.log_prob.isfinite().tolist() == [True] * 4 + [False] * 5
        assert kept.status.tolist()[6:] == [sdekit.Status.INTERRUPTED] * 3

    def test_an_interrupt_within_a_solve_ends_the_work_with_what_there_is(self):
        def stop(call, x, label, answer):
            if call == 20:
                raise KeyboardInterrupt
            return answer()

        model, watch = watched(mixture(2, 3).score_model(VP), stop)
        x = mixture(2, 3).sample(9, generator=seeded(0))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            kept = chunked(lambda part, rows: sdekit.log_likelihood(model, part, indices=rows, nodes=8), x, chunk=2)
        assert "3 of 9 samples were not reached" in str(seen[-1].message)
        assert seen[-1].filename == __file__
        assert watch.calls == 20
        assert kept.log_prob.isfinite().tolist() == [True] * 4 + [False] * 5
        assert kept.status.tolist() == [sdekit.Status.DONE] * 4 + [sdekit.Status.INTERRUPTED] * 5
        assert kept.stats.evaluations.tolist() == [8] * 4 + [3] * 2 + [0] * 3
        assert kept.latent.shape == (9, 2)

    def test_an_interrupt_between_solves_too_and_before_the_first_it_is_raised(self):
        def work(part, rows):
            if int(rows[0]) >= stop:
                raise KeyboardInterrupt
            return Path(part, part)

        x, stop = draw(1, 6, 3), 4
        with pytest.warns(sdekit.PartialResultWarning, match="2 of 6"):
            kept = chunked(work, x, chunk=2)
        assert torch.equal(kept.x[:4], x[:4])
        assert kept.x[4:].isnan().all()
        stop = 0
        with pytest.raises(KeyboardInterrupt):
            chunked(work, x, chunk=2)

    def test_an_interrupt_while_the_size_is_chosen_ends_the_work_too(self):
        def stop(call, x, label, answer):
            raise KeyboardInterrupt

        model, _ = watched(mixture(2, 3).score_model(VP), stop)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            kept = chunked(lambda part, rows: sdekit.log_likelihood(model, part, indices=rows), draw(1, 5, 2))
        assert "3 of 5 samples were not reached" in str(seen[-1].message)
        assert (kept.status == sdekit.Status.INTERRUPTED).all()

    def test_any_other_error_keeps_what_there_is_unless_there_is_nothing(self):
        def work(part, rows):
            if int(rows[0]) >= stop:
                raise RuntimeError("the disk is full")
            return Stats(rows, rows, rows, 1, len(rows))

        x, stop = draw(1, 6, 3), 4
        with pytest.raises(sdekit.SolveError, match="the disk is full 2 of 6") as caught:
            chunked(work, x, chunk=2)
        assert caught.value.solution.accepted.tolist() == [0, 1, 2, 3, 0, 0]
        assert caught.value.solution.calls == 2
        stop = 0
        with pytest.raises(RuntimeError, match="the disk is full"):
            chunked(work, x, chunk=2)

    def test_a_sampled_density_that_was_interrupted_is_whole(self):
        def stop(call, x, label, answer):
            if call == 12:
                raise KeyboardInterrupt
            return answer()

        model, _ = watched(mixture(2, 3).score_model(VP), stop)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sdekit.PartialResultWarning)
            kept = chunked(
                lambda part, rows: sample_log_prob(model, (len(rows), 2), nodes=8, indices=rows),
                torch.zeros(6),
                chunk=2,
            )
        assert kept.x.shape == (6, 2)
        assert kept.log_prob.isfinite().tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("function", "x", "options", "error", "message"),
    [
        (lambda part, rows: part, [1.0, 2.0], {}, TypeError, "x is a list"),
        (lambda part, rows: part, torch.tensor(1.0), {}, TypeError, r"shape \(\)"),
        (lambda part, rows: part, torch.ones(3, 2), {"chunk": 0}, ValueError, "chunk=0"),
        (lambda part, rows: part.sum(), torch.ones(3, 2), {"chunk": 2}, ValueError, r"shape \(\) for 2 samples"),
        (lambda part, rows: Stats(part, part, part[:1], 1, 2), torch.ones(3, 2), {"chunk": 2}, ValueError, "rejected"),
    ],
)
def test_what_does_not_fit_is_refused(function, x, options, error, message):
    with pytest.raises(error, match=message):
        chunked(function, x, **options)


def test_numbers_that_are_the_same_in_every_chunk_are_not_added_up():
    model, k = mixture(2, 0).score_model(VP), torch.tensor([[0, 1], [2, 3], [1, 1], [3, 0]])

    def bound(part, rows):
        return discrete_log_likelihood(model, part, levels=4, low=-2.0, high=2.0, nodes=6, indices=rows)

    torch.testing.assert_close(chunked(bound, k, chunk=2).bits_per_dim(), bound(k, torch.arange(4)).bits_per_dim())


class Fragile(nn.Module):
    """A mixture's prediction, NaN where its condition says so; after `calls` calls it raises."""

    def __init__(self, model, calls=10**9):
        super().__init__()
        self.model, self.left = model, calls

    def forward(self, x, label, broken=None):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("no more")
        out = self.model.net(x, label)
        return out if broken is None else torch.where(broken[:, None], torch.nan, out)


@pytest.mark.parametrize("bad", [0, 2, 5])
@pytest.mark.parametrize("ratio", [False, True])
def test_a_sample_that_fails_in_any_chunk_leaves_the_others(bad, ratio):
    target = mixture(2, 0)
    exact = target.score_model(VP)
    model = sdekit.ScoreModel(Fragile(exact), VP, exact.parameterization, exact.data_std)
    x, broken = target.sample(6, generator=seeded(1)), torch.arange(6) == bad

    def density(part, rows):
        asked = model.condition(broken=broken[rows])
        if ratio:
            return log_ratio(asked, exact, part, indices=rows, nodes=6)
        return sdekit.log_likelihood(asked, part, indices=rows, nodes=6, budget=True)

    with pytest.raises(sdekit.SolveError) as caught:
        chunked(density, x, chunk=2)
    found = caught.value.solution
    value = found.value if ratio else found.log_prob
    assert value.shape == (6,)
    assert value[torch.arange(6) // 2 != bad // 2].isfinite().all()
    assert value[bad].isnan()


@pytest.mark.parametrize("calls", [4, 14, 15])
def test_a_network_that_gives_up_leaves_what_was_done(calls):
    target = mixture(2, 0)
    exact = target.score_model(VP)
    model = sdekit.ScoreModel(Fragile(exact, calls), VP, exact.parameterization, exact.data_std)

    def density(part, rows):
        return sdekit.log_likelihood(model, part, indices=rows, nodes=6, budget=True)

    with pytest.raises(sdekit.SolveError, match="no more") as caught:
        chunked(density, target.sample(6, generator=seeded(1)), chunk=2)
    assert caught.value.solution.log_prob.shape[0] in (2, 6)
    assert caught.value.solution.log_prob[:2].isfinite().all() == (calls > 4)
