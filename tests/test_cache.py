"""The teacher cache: what a run learns from it is what it would have learned from the teachers themselves."""

from __future__ import annotations

import errno
import multiprocessing
import pickle
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgekd.artifact import write_manifest
from edgekd.console import Terminal
from edgekd.data import view_store
from edgekd.data.loader import TrainLoader
from edgekd.data.view_plan import ViewPlan, view_digest
from edgekd.data.view_store import ViewStore, hold, shard_is_intact, shard_name, write_shard
from edgekd.detectors.base import Detector
from edgekd.errors import ArtifactError, DistillationSetupError, TeacherError, UserError
from edgekd.recipe import AugmentConfig, CacheConfig, DistillConfig, EnsembleConfig, Recipe, TermConfig
from edgekd.teachers import cache
from edgekd.teachers.base import TeacherOutput
from edgekd.teachers.cache import Estimate, Recording, Wanted, make_room
from edgekd.teachers.claims import fill_together
from edgekd.teachers.ensemble import fuse
from edgekd.teaching import record_views
from edgekd.training.distill import Clock, Distiller, TeacherSet
from edgekd.training.learning import LearningStep, StepInput
from edgekd.training.train import TrainJob, train_detector
from edgekd.types import SoftDetections
from edgekd.workspace import Workspace
from tests.cache_doubles import SHARD, Counting, fill, recording
from tests.test_distill import oracle
from tests.test_train import MODEL, make_job, step_losses
from tests.toy import BlackBox, ToyTeacher, toy_dataset, toy_detector

TERMS = {
    "boxes": (TermConfig(loss="response"),),
    "rows": (TermConfig(loss="response", params={"mode": "priors"}),),
    "maps": (TermConfig(loss="feature"), TermConfig(loss="response")),
    "all": (
        TermConfig(loss="mgd"),
        TermConfig(loss="response", params={"mode": "priors"}),
        TermConfig(loss="decoupled"),
    ),
}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (view_store, cache):
        monkeypatch.setattr(module, "SHARD_IMAGES", SHARD)


def wbf(answers: Sequence[SoftDetections]) -> SoftDetections:
    return fuse(answers, [0.5] * len(answers), EnsembleConfig())


def distilling(
    folder: Path, out: str, config: DistillConfig, teachers: Sequence[ToyTeacher], epochs: int = 2, cache: str = "views"
) -> TrainJob:
    """A distillation as `stages.distill_student` sets it up."""
    job = make_job(folder, out, epochs=epochs)
    recipe = Recipe(name="r", seed=job.seed, data=job.data, student=MODEL, train=job.train, distill=config)
    work = Workspace(recipe, job.dataset, job.dataset, "cpu", Terminal(quiet=True))
    answers = tuple(oracle(job.dataset, noise=float(i)) for i in range(len(teachers)))
    fused = {name: wbf([one[name] for one in answers]) for name in answers[0]}

    def make(student: Detector) -> Distiller:
        weights = (1 / len(teachers),) * len(teachers)
        distiller = Distiller(student, TeacherSet(tuple(teachers), weights, wbf, answers, fused), config)
        if config.cache is not None:
            record_views(work, distiller, [{"run": teacher.name} for teacher in teachers], folder / cache)
        return distiller

    return replace(job, make_distiller=make, inputs={**job.inputs, "distill": repr(config)})


def two_teachers() -> list[Counting]:
    return [Counting(toy_detector(seed=9), "a"), Counting(toy_detector(seed=10), "b")]


def losses_on_views(job: TrainJob, epochs: int = 2) -> list[dict[str, float]]:
    """Every loss of every batch for one unmoving student, through the run's own loader and step."""
    assert job.make_distiller is not None
    student = toy_detector(seed=0)
    torch.manual_seed(0)
    learner = LearningStep(student, job.make_distiller(student), 1.0).train()
    distiller = learner.distiller
    assert distiller is not None
    loader = TrainLoader(
        job.dataset,
        preprocess=student.spec.preprocess,
        augment=job.augment,
        batch_size=4,
        seed=job.seed,
        epochs=epochs,
        workers=0,
        extra_hw=distiller.loader_hw,
        answers=distiller.loader_answers,
        plan=distiller.plan,
        stores=distiller.stores,
    )
    return [
        {name: float(loss.detach()) for name, loss in learner(StepInput(batch, Clock(epoch, epochs), False)).items()}
        for epoch in range(epochs)
        for batch in loader.epoch(epoch)
    ]


@pytest.mark.parametrize("terms", list(TERMS))
@pytest.mark.parametrize("answers", ["image", "online"])
def test_the_cache_gives_the_losses_of_online_teachers(tmp_path: Path, terms: str, answers: Any) -> None:
    plain = DistillConfig(terms=TERMS[terms], answers=answers)
    online = losses_on_views(distilling(tmp_path, "online", plain, two_teachers()))
    teachers = two_teachers()
    config = plain.model_copy(update={"cache": CacheConfig(views=2)})
    cached = losses_on_views(distilling(tmp_path, "cached", config, teachers))
    seen = [teacher.seen for teacher in teachers]
    needed = answers == "online" or terms != "boxes"
    assert seen == ([12 * 2 + 8 + 1] * 2 if needed else [0, 0])  # two views of 12 images, and the estimate
    for ours, theirs in zip(cached, online, strict=True):
        assert ours.keys() == theirs.keys()
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=2e-3)


def test_black_boxes_are_cached_too(tmp_path: Path) -> None:
    def teachers() -> list[ToyTeacher]:
        return [BlackBox(toy_detector(seed=9), "a"), Counting(toy_detector(seed=10, input_size=128), "b")]

    config = DistillConfig(terms=TERMS["boxes"], answers="online")
    online = losses_on_views(distilling(tmp_path, "online", config, teachers()))
    cached = losses_on_views(
        distilling(tmp_path, "cached", config.model_copy(update={"cache": CacheConfig(views=2)}), teachers())
    )
    for ours, theirs in zip(cached, online, strict=True):
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=2e-3)


def test_training_runs_no_teacher_and_a_second_run_asks_none(tmp_path: Path) -> None:
    config = DistillConfig(terms=TERMS["maps"], cache=CacheConfig(views=2))
    first, second = two_teachers(), two_teachers()
    train_detector(distilling(tmp_path, "first", config, first, epochs=3))
    assert [teacher.seen for teacher in first] == [33, 33]  # views come round: two for three epochs
    train_detector(distilling(tmp_path, "second", config, second, epochs=3))
    assert [teacher.seen for teacher in second] == [0, 0]
    assert step_losses(tmp_path / "first") == step_losses(tmp_path / "second")


def test_a_further_view_is_added_to_those_there(tmp_path: Path) -> None:
    recording(tmp_path, count=8).fill()
    more = recording(tmp_path, count=8, views=3, epochs=3)
    more.fill()
    assert isinstance(more.teacher, Counting)
    assert more.teacher.seen == 8


# ------------------------------------------------------------------------------------------------------- invalidation


def loader_of(made: Recording, plan: ViewPlan, store: ViewStore, batch_size: int = 4, workers: int = 0) -> TrainLoader:
    return TrainLoader(
        made.plan.dataset,
        preprocess=made.teacher.preprocess,
        augment=AugmentConfig(),
        batch_size=batch_size,
        seed=3,
        epochs=2,
        workers=workers,
        plan=plan,
        stores=(store,),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 4},
        {"augment": AugmentConfig(flip=0.0)},
        {"identity": {"teacher": "other", "data": "hash"}},
        {"identity": {"teacher": "hash", "data": "other"}},
        {"teacher": Counting(toy_detector(seed=9, input_size=128), "a")},
        {"wanted": Wanted(True, True, ())},
    ],
    ids=["seed", "augmentation", "teacher", "data", "size", "what is kept"],
)
def test_any_change_asks_the_teacher_again(tmp_path: Path, changes: dict[str, Any]) -> None:
    before, after = recording(tmp_path), recording(tmp_path, **changes)
    before.fill()
    assert before.is_filled()
    assert before.folder != after.folder
    assert not after.is_filled()


def test_a_change_that_changes_no_view_asks_nobody(tmp_path: Path) -> None:
    before, after = recording(tmp_path), recording(tmp_path, epochs=9, augment=AugmentConfig(close_mosaic_epochs=2))
    before.fill()
    after.fill()
    assert isinstance(after.teacher, Counting)
    assert after.teacher.seen == 0


def test_a_cache_of_other_views_is_refused(tmp_path: Path) -> None:
    made = recording(tmp_path)
    store = made.fill()
    other = replace(made.plan, seed=99)
    loader = loader_of(made, other, store)
    with pytest.raises(ArtifactError, match="other views"):
        next(loader.epoch(0))


# ------------------------------------------------------------------------------------------- damage, interruption, rivals


@pytest.mark.parametrize("where", [0, 40, -1, -3000, None], ids=["length", "header", "end", "middle", "cut off"])
def test_a_damaged_shard_is_found_and_made_again(tmp_path: Path, where: int | None) -> None:
    made = recording(tmp_path)
    made.fill()
    path = made.folder / made.names[1]
    content = path.read_bytes()
    broken = bytearray(content)
    if where is None:
        del broken[len(broken) // 2 :]
    else:
        broken[where] ^= 4
    path.write_bytes(bytes(broken))
    assert not shard_is_intact(path)
    again = recording(tmp_path)
    again.fill()
    assert isinstance(again.teacher, Counting)
    assert again.teacher.seen == SHARD
    assert path.read_bytes() == content


def test_what_a_killed_process_left_of_a_shard_is_removed(tmp_path: Path) -> None:
    made = recording(tmp_path)
    made.folder.mkdir(parents=True)
    left = made.folder / f".{made.names[0].split('.')[0]}.abc123.safetensors"
    left.write_bytes(b"half")
    made.fill()
    assert sorted(path.name for path in made.folder.glob("*.safetensors")) == sorted(made.names)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_those_of_their_images(tmp_path: Path, workers: int) -> None:
    made = recording(tmp_path)
    tap = made.wanted.taps[0]
    loader = loader_of(made, made.plan, made.fill(), batch_size=7, workers=workers)
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            (kept,) = batch.stored
            said = made.teacher.respond(batch.images_u8, (tap,))
            assert said.dense is not None
            assert kept.soft is not None
            assert kept.arrays[f"tap.{tap}"].dtype == torch.float16
            torch.testing.assert_close(kept.arrays[f"tap.{tap}"].float(), said.taps[tap], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(
                kept.arrays["dense.cls_logits"].float(), said.dense.cls_logits, rtol=1e-3, atol=1e-3
            )
            for ours, theirs in zip(kept.soft.boxes_xyxy, said.soft.boxes_xyxy, strict=True):
                assert ours.shape == theirs.shape
    loader.close()


def _start(folder: Path, environments: Sequence[dict[str, str]]) -> tuple[list[Any], Any, Any]:
    """Processes that begin to fill at once, the queue in which each tells what its teacher has seen, and their barrier.

    Queue and barrier have to be held: their locks go with them, and the processes want them.
    """
    context = multiprocessing.get_context("spawn")
    seen, begin = context.Queue(), context.Barrier(len(environments))
    children = [context.Process(target=fill, args=(folder, seen, begin, one)) for one in environments]
    for child in children:
        child.start()
    return children, seen, begin


@pytest.mark.parametrize(
    "environments",
    [[{}, {}], [{"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2"}]],
    ids=["strangers", "ranks"],
)
def test_two_processes_share_the_work(tmp_path: Path, environments: list[dict[str, str]]) -> None:
    toy_dataset(tmp_path / "images", count=3 * SHARD)
    children, seen, _begin = _start(tmp_path, environments)
    counts = [seen.get(timeout=300) for _ in children]
    for child in children:
        child.join(300)
        assert child.exitcode == 0
    assert sum(counts) == 2 * 3 * SHARD  # every view once, by one of them
    assert min(counts) > 0
    made = recording(tmp_path, count=3 * SHARD)
    assert all(shard_is_intact(made.folder / name) for name in made.names)


def test_a_killed_fill_goes_on_where_it_was(tmp_path: Path) -> None:
    toy_dataset(tmp_path / "images", count=3 * SHARD)
    made = recording(tmp_path, count=3 * SHARD)
    (child,), _seen, _begin = _start(tmp_path, [{}])
    deadline = time.monotonic() + 300
    while len(list(made.folder.glob("0*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    child.kill()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    there = sum((made.folder / name).is_file() for name in made.names)
    assert 2 <= there < len(made.names)
    made.fill()
    assert isinstance(made.teacher, Counting)
    assert made.teacher.seen == (len(made.names) - there) * SHARD
    assert all(shard_is_intact(made.folder / name) for name in made.names)


# ------------------------------------------------------------------------------------------------------------- budget


def test_nothing_is_written_beyond_the_budget(tmp_path: Path) -> None:
    small = CacheConfig(views=2, disk_budget_gib=1e-6)
    config = DistillConfig(terms=TERMS["maps"], cache=small)
    with pytest.raises(DistillationSetupError, match="beyond its disk budget"):
        losses_on_views(distilling(tmp_path, "refused", config, two_teachers()))
    assert not list(tmp_path.glob("views/**/*.safetensors"))


@pytest.mark.parametrize("update", [{"disk_budget_gib": 1e-6}, {"features": False}])
def test_the_fallback_learns_from_the_same_views(tmp_path: Path, update: dict[str, Any]) -> None:
    config = DistillConfig(terms=TERMS["maps"], cache=CacheConfig(views=2))
    cached = losses_on_views(distilling(tmp_path, "cached", config, two_teachers(), epochs=3), epochs=3)
    config = DistillConfig(terms=TERMS["maps"], cache=CacheConfig(views=2, fallback="online", **update))
    teachers = two_teachers()
    online = losses_on_views(distilling(tmp_path, "online", config, teachers, epochs=3, cache="elsewhere"), epochs=3)
    assert min(teacher.seen for teacher in teachers) >= 36
    for ours, theirs in zip(cached, online, strict=True):
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=2e-3)


def test_the_estimate_is_what_is_written(tmp_path: Path) -> None:
    made = recording(tmp_path)
    size, _ = made.measure()
    expected = size * 2 * len(made.plan.dataset)
    assert not made.root.exists()
    made.fill()
    assert made.bytes_there() == pytest.approx(expected, rel=0.05)


def test_room_is_made_by_leaving_out_what_nobody_uses(tmp_path: Path) -> None:
    old, held, new = (recording(tmp_path, count=8, seed=seed) for seed in (1, 2, 3))
    old.fill()
    store = held.fill()
    size = held.bytes_there()
    make_room(old.root, [new.folder], Estimate(size, size, 1.0), int(2.5 * size))
    assert not old.folder.exists()
    assert held.is_filled()
    with pytest.raises(DistillationSetupError, match="other runs use"):
        make_room(old.root, [new.folder], Estimate(size, size, 1.0), int(1.5 * size))
    assert held.is_filled()
    assert store.folder == held.folder


def test_a_cache_folder_that_holds_other_things_too(tmp_path: Path) -> None:
    old = recording(tmp_path, count=8, seed=1)
    old.fill()
    size = old.bytes_there()
    (old.folder / ".in-use").unlink()  # copied without hidden files
    for name, manifest in (("run", None), ("extension", "{}"), ("damaged", "{")):
        folder = old.root / name
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(bytes(size))
        if manifest is None:
            write_manifest(folder, "run", {}, [], {})
        else:
            (folder / "manifest.json").write_text(manifest)
    make_room(old.root, [], Estimate(size, size, 1.0), int(1.5 * size))
    assert sorted(folder.name for folder in old.root.iterdir()) == ["damaged", "extension", "run"]


@pytest.mark.parametrize("fits", [True, False])
def test_of_several_processes_the_first_alone_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    config = DistillConfig(terms=TERMS["maps"], cache=CacheConfig(views=2))
    job = distilling(tmp_path, "run", config, two_teachers())
    assert job.make_distiller is not None
    told = None if fits else DistillationSetupError("the disk has no room", got="0 GiB")
    monkeypatch.setattr("edgekd.teaching.ranks.rank", lambda: 1)
    monkeypatch.setattr("edgekd.teaching.ranks.gather", lambda own: [pickle.loads(pickle.dumps(told)), own])
    monkeypatch.setattr("edgekd.teaching.make_room", None)
    if fits:
        job.make_distiller(toy_detector(seed=0))
        return
    with pytest.raises(DistillationSetupError, match="no room\n  got:      0 GiB"):
        job.make_distiller(toy_detector(seed=0))


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DistillationSetupError, match="no room"):
        make_room(tmp_path / "views", [], Estimate(2**60, 2**60, 1.0), 2**61)


# -------------------------------------------------------------------------------------------------------------- parts


def test_values_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    class Loud(ToyTeacher):
        def respond(self, images_u8: Tensor, taps: Sequence[str] = (), boxes: bool = True) -> TeacherOutput:
            answer = super().respond(images_u8, taps, boxes)
            return replace(answer, taps={name: value + 1e6 for name, value in answer.taps.items()})

    with pytest.raises(TeacherError, match="half precision"):
        recording(tmp_path, Loud(toy_detector(seed=9), "loud")).fill()


def test_a_plan_without_views_draws_new_ones_each_epoch(tmp_path: Path) -> None:
    dataset = toy_dataset(tmp_path, count=3)
    spec = toy_detector().spec.preprocess
    augment = AugmentConfig(mosaic=1.0, close_mosaic_epochs=2)
    endless, few = (ViewPlan(dataset, augment, spec, 0, 6, views) for views in (None, 2))
    assert len({view_digest(endless.view(endless.slot(epoch), 0)) for epoch in range(6)}) == 6
    assert few.slots == [0, 1, 2, 3]  # two with mosaic, and for the last two epochs two without
    assert few.view(few.slot(0), 1) == few.view(few.slot(2), 1)
    assert [len(few.view(few.slot(epoch), 1).parts) for epoch in range(6)] == [4, 4, 4, 4, 1, 1]


def test_a_shard_reads_back(tmp_path: Path) -> None:
    path = tmp_path / shard_name(0, 0)
    rows = {
        "views": np.arange(3, dtype=np.uint64),
        "tap.x": np.random.default_rng(0).random((3, 5, 7)).astype(np.float16),
        "soft.ends": np.array([2, 2, 3]),
        "soft.boxes": np.arange(12, dtype=np.float32).reshape(3, 4),
        "soft.probs": np.ones((3, 2), np.float16),
    }
    write_shard(path, rows)
    store = ViewStore(tmp_path)
    store.prefetch(0, [2, 0])
    found = store.rows(0, [2, 0, 1])
    assert found.digests == [2, 0, 1]
    assert np.array_equal(found.arrays["tap.x"], rows["tap.x"][[2, 0, 1]])
    assert found.soft is not None
    assert [len(boxes) for boxes in found.soft[0]] == [1, 2, 0]
    assert found.soft[0][0].tolist() == [[8, 9, 10, 11]]
    assert hold(tmp_path, alone=True) is None


def test_a_store_keeps_few_of_its_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has 1,024 descriptors as a rule; VOC's trainval at 4 views of 3 teachers and their fusion has more shards."""
    monkeypatch.setattr("edgekd.data.view_store.OPEN_SHARDS", 2)
    for block in range(6):
        rows = np.arange(SHARD, dtype=np.uint64) + SHARD * block
        write_shard(tmp_path / shard_name(0, block), {"views": rows, "tap.x": rows.astype(np.float16)[:, None]})
    store, indices = ViewStore(tmp_path), [SHARD * block + block for block in (5, 0, 3, 1, 4, 2, 0)]

    def mapped() -> int:
        return sum(str(tmp_path) in line and ".safetensors" in line for line in Path("/proc/self/maps").open())

    for _ in range(2):
        store.prefetch(0, indices)
        found = store.rows(0, indices)
        assert found.digests == indices
        assert found.arrays["tap.x"][:, 0].tolist() == indices
        assert mapped() == 2


def test_a_file_system_without_locks_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("edgekd.data.view_store.fcntl.flock", flock)
    with pytest.raises(UserError, match=r"No locks available[\s\S]*distill\.cache\.folder"):
        ViewStore(tmp_path)


def test_what_another_process_makes_is_waited_for(tmp_path: Path) -> None:
    made: list[str] = []
    count = fill_together(tmp_path, ["a", "b"], lambda name, whole: name == "a", made.append)
    assert made == ["b"]
    assert count == 1


def test_a_process_that_is_alone_reads_every_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts of job arrays set RANK too, and nobody else would look whether a file is damaged."""
    monkeypatch.setenv("RANK", "1")
    looked: list[tuple[str, bool]] = []

    def ready(name: str, whole: bool) -> bool:
        looked.append((name, whole))
        return True

    fill_together(tmp_path, ["a", "b"], ready, lambda name: None)
    assert looked == [("a", True), ("b", True)]
