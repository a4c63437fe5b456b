"""Jobs on a Ray cluster of several nodes, one of which is killed; results are those of this machine alone."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from adapters.models import write_subspace
from datasets.official_layouts import write_rgbd_folder
from jobs.pool_work import note_process, visible_resources, wait_for_go
from training.plane_scenes import write_plane_scenes
from training.tiny import read_metrics, without_time

from subspace3d import __version__
from subspace3d.backbones.build import build_backbone
from subspace3d.cli import main
from subspace3d.commands import adapt, convert, evaluate, finetune, fit, generate
from subspace3d.commands.adapt import AdaptConfig
from subspace3d.commands.convert import ConvertConfig
from subspace3d.commands.evaluate import EvaluateConfig
from subspace3d.commands.finetune import FinetuneConfig
from subspace3d.commands.fit import FitConfig
from subspace3d.commands.generate import GenerateConfig
from subspace3d.files import read_json
from subspace3d.jobs import cluster
from subspace3d.jobs.pool import run_jobs
from subspace3d.locks import FolderInUse
from subspace3d.training.config import TrainConfig

NODES = 2


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A head without cores, so that every job runs on one of two nodes with one core each."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # processes on the nodes import the jobs of the tests
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        group = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(NODES):
            group.add_node(num_cpus=1)
        yield group
        group.shutdown()


def _until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def _kill(nodes: Any, raylet: int) -> None:
    """Kill -9 of the node whose raylet is this process, the parent of its workers."""
    (node,) = [n for n in nodes.worker_nodes if n.all_processes["raylet"][0].process.pid == raylet]
    nodes.remove_node(node, allow_graceful=False)


@pytest.mark.slow(reason="starts a cluster of three nodes")
def test_every_job_ends_once_when_a_node_is_killed(nodes: Any, tmp_path: Path) -> None:
    names, ended = ["a", "b", "c", "d", "e"], []

    def kill_one() -> None:
        last = _until(lambda: _lines(tmp_path / "started")[NODES - 1 :])[0]
        name, process, raylet = last.split()
        _kill(nodes, int(raylet))
        _until(lambda: not Path(f"/proc/{process}").exists())
        killed.append(name)
        (tmp_path / "go").touch()

    killed: list[str] = []
    watcher = threading.Thread(target=kill_one)
    watcher.start()
    with cluster.joined_cluster(_fields(nodes)) as joined:
        failures = run_jobs(names, wait_for_go, tmp_path, 1, ended.append, cluster=joined)
    watcher.join()
    assert failures == {} and sorted(ended) == names and sorted(_lines(tmp_path / "ended")) == names
    starts = Counter(line.split()[0] for line in _lines(tmp_path / "started"))
    assert starts == {name: 1 + (name in killed) for name in names}
    assert all((tmp_path / name).read_text() == name for name in names)


@pytest.mark.slow(reason="starts a cluster of three nodes")
def test_failures_are_those_of_the_pool(nodes: Any, tmp_path: Path) -> None:
    ended: list[str] = []
    with cluster.joined_cluster(_fields(nodes)) as joined:
        assert joined == cluster.Cluster(cpus=1, gpus=0.0)
        failures = run_jobs(["one", "raises", "dies", "two"], note_process, tmp_path, 1, ended.append, cluster=joined)
        assert sorted(ended) == ["dies", "one", "raises", "two"]
        assert failures["raises"] == "no good" and "WorkerCrashedError" in failures["dies"] and len(failures) == 2
        with pytest.raises(ValueError, match="weights: no such file"):
            run_jobs(["one"], note_process, tmp_path / "broken", 1, cluster=joined)
        with pytest.raises(ValueError, match="invalid literal"):
            joined.call(int, "x")
    message = "ray_cpus and ray_gpus must be what one machine of the cluster has, got 9"
    too_much = cluster.joined_cluster(dataclasses.replace(_fields(nodes), ray_cpus=9))
    with pytest.raises(ValueError, match=message), too_much:
        pass


@pytest.mark.slow(reason="starts a cluster of three nodes")
def test_jobs_get_the_cores_and_gpus_they_ask_for(nodes: Any) -> None:
    # Ray takes the number on trust
    nodes.add_node(num_cpus=3, num_gpus=2)
    with cluster.joined_cluster(_fields(nodes)) as joined:
        assert joined is not None and joined.gpus == 1.0
        assert joined.call(visible_resources) in (("1", "0"), ("1", "1"))
    with cluster.joined_cluster(dataclasses.replace(_fields(nodes), ray_cpus=3, ray_gpus=2.0)) as joined:
        assert joined is not None and sorted(joined.call(visible_resources)[1].split(",")) == ["0", "1"]
    with cluster.joined_cluster(_fields(nodes), on_cpu=True) as joined:
        assert joined == cluster.Cluster(cpus=1, gpus=0.0)


@pytest.mark.slow(reason="starts a cluster of three nodes, renders and tunes on it")
def test_generate_and_adapt_with_a_killed_node_give_what_one_machine_gives(nodes: Any, tmp_path: Path) -> None:
    scenes = GenerateConfig(out=tmp_path / "here", scenes=3, views=2, resolution=32, spp=4, workers=1)
    generate.run(scenes)
    flags = ["--scenes", "3", "--views", "2", "--resolution", "32", "--spp", "4", "--ray", nodes.address]
    main(["generate", "--out", str(tmp_path / "there"), *flags])
    assert _digests(tmp_path / "here") == _digests(tmp_path / "there") != {}

    data = tmp_path / "data"
    for index, name in enumerate("abc"):
        write_plane_scenes(data / name, scenes=2, views=2, seed=index)
    train = TrainConfig(
        steps=20, lr=1e-3, frames=(2, 2), images_per_step=2, image_size=28, save_every=5, checkpointing=False,
        check_memory=False, device="cpu", threads=1,
    )  # fmt: skip
    config = AdaptConfig(scenes=data, out=tmp_path / "alone", weights=Path("random"), rank=2, train=train)
    adapt.run(config)
    out = tmp_path / "cluster"
    interrupted: list[str] = []

    def kill_one() -> None:
        saved = _until(lambda: list((out / ".work").glob("*/checkpoints/step_5")))[0]
        work = saved.parents[1]
        _kill(nodes, _parent(_holder(work / ".lock")))
        assert not (out / work.name).exists(), "the job ended before its node was killed"
        interrupted.append(work.name)

    watcher = threading.Thread(target=kill_one)
    watcher.start()
    folders = adapt.run(dataclasses.replace(config, out=out, ray=nodes.address))
    watcher.join()
    assert interrupted and [folder.name for folder in folders] == list("abc")
    for name in "abc":
        alone, there = (folder / name / "adapter_model.safetensors" for folder in (config.out, out))
        assert alone.read_bytes() == there.read_bytes(), name
        assert without_time(read_metrics(config.out / name)) == without_time(read_metrics(out / name))
        assert [line["step"] for line in read_metrics(out / name)] == list(range(1, 21))
    assert not (out / ".work").exists()


@pytest.mark.slow(reason="starts a cluster of three nodes and tunes on it")
def test_adapters_tuned_together_on_a_cluster_are_those_of_one_machine(nodes: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for index, name in enumerate("abcd"):
        write_plane_scenes(data / name, scenes=2, views=2, seed=index)
    train = TrainConfig(
        steps=4, lr=1e-3, frames=(2, 2), images_per_step=2, image_size=28, checkpointing=False, check_memory=False,
        device="cpu", threads=1,
    )  # fmt: skip
    config = AdaptConfig(scenes=data, out=tmp_path / "alone", weights=Path("random"), rank=2, train=train, together=2)
    adapt.run(config)
    # two jobs of two adapters each, one on every node
    folders = adapt.run(dataclasses.replace(config, out=tmp_path / "cluster", ray=nodes.address))
    assert [folder.name for folder in folders] == list("abcd")
    for name in "abcd":
        alone, there = (tmp_path / out / name for out in ("alone", "cluster"))
        weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (alone, there)]
        assert weights[0] == weights[1], name
        assert without_time(read_metrics(alone)) == without_time(read_metrics(there))
    assert not (tmp_path / "cluster/.work").exists()


@pytest.mark.slow(reason="starts a cluster of three nodes, runs a part of the experiments here and on it")
def test_experiments_with_a_killed_node_give_what_one_machine_gives(nodes: Any, tmp_path: Path) -> None:
    flags = ["--scale", "smoke", "--only", "psv", "--seeds", "1", "--workers", "1"]
    main(["experiments", "--out", str(tmp_path / "here"), *flags])
    out = tmp_path / "there"
    killed: list[str] = []

    def kill_one() -> None:
        log = _until(lambda: list(out.glob("runs/*/*_lr*/log.txt")))[0]
        _kill(nodes, _parent(_holder(log)))
        assert not (log.parent / "job.json").exists(), "the job ended before its node was killed"
        killed.append(log.parent.name)

    watcher = threading.Thread(target=kill_one)
    watcher.start()
    main(["experiments", "--out", str(out), *flags, "--ray", nodes.address])
    watcher.join()
    assert killed
    here, there = (_measured(folder) for folder in (tmp_path / "here", out))
    assert here == there and f"bodies/validation/methods/{killed[0]}.json" in here


def _measured(folder: Path) -> dict[str, dict]:
    """Means of every run on every split."""
    return {
        str(path.relative_to(folder / "evaluation")): read_json(path)["mean"]
        for path in (folder / "evaluation").rglob("methods/*.json")
    }


@pytest.mark.slow(reason="starts a cluster of three nodes and converts on it")
def test_convert_with_a_killed_node_gives_what_one_machine_gives(nodes: Any, tmp_path: Path) -> None:
    for name in "abcd":
        write_rgbd_folder(tmp_path / "root" / name, views=60)
    # every scene loses a frame, of which the process that is killed cannot tell any more
    for path in (tmp_path / "root").glob("*/rgb/001.png"):
        path.write_bytes(b"no image")
    config = ConvertConfig(out=tmp_path / "here", from_="rgbd", root=tmp_path / "root")
    convert.run(config)
    out = tmp_path / "there"
    killed: list[Path] = []

    def kill_one() -> None:
        begun = _until(lambda: list(out.glob("rgbd/.*/images/0002.png")))[0]
        _kill(nodes, _parent(_until(_jobs)[0]))
        killed.append(begun)

    watcher = threading.Thread(target=kill_one)
    watcher.start()
    convert.run(dataclasses.replace(config, out=out, ray=nodes.address))
    watcher.join()
    assert killed and _digests(config.out) == _digests(out) != {}
    assert sorted(read_json(out / "skipped-rgbd.json")) == list("abcd")


@pytest.mark.slow(reason="starts a cluster of three nodes and measures on it")
def test_evaluate_with_a_killed_node_gives_what_one_machine_gives(nodes: Any, tmp_path: Path) -> None:
    write_plane_scenes(tmp_path / "scenes", scenes=8, views=2, size=28)
    finetune.run(
        FinetuneConfig(scenes=tmp_path / "scenes", out=tmp_path / "tuned", method="none", weights=Path("random"))
    )
    config = EvaluateConfig(
        scenes=tmp_path / "scenes", out=tmp_path / "here", tuned=(tmp_path / "tuned",), weights=Path("random"),
        frames=2, device="cpu",
    )  # fmt: skip
    expected = evaluate.run(config)["methods"]
    out = tmp_path / "there"
    measured: dict[str, float] = {}

    def seconds_of_the_first(record: dict) -> float:
        return record["details"]["scene_0000"]["inference_seconds"]

    def kill_one() -> None:
        first = [out / f"methods/{name}.parts/0.json" for name in expected]
        _until(lambda: all(path.exists() for path in first))
        parts = {path.parent.stem: read_json(path) for path in first}
        _kill(nodes, _parent(_until(_jobs)[0]))
        assert not list(out.glob("methods/*.json")), "a job ended before a node was killed"
        measured.update({name: seconds_of_the_first(part) for name, part in parts.items()})

    watcher = threading.Thread(target=kill_one)
    watcher.start()
    found = evaluate.run(dataclasses.replace(config, out=out, ray=nodes.address))["methods"]
    watcher.join()
    assert found.keys() == expected.keys() == {"base", "tuned"}
    # a scene that was measured is not measured again, whichever job was cut off
    assert measured == {name: seconds_of_the_first(method) for name, method in found.items()}
    for name, method in expected.items():
        defined = {metric: value for metric, value in method["mean"].items() if value is not None}
        assert {metric: found[name]["mean"][metric] for metric in defined} == pytest.approx(defined, rel=1e-4)


@pytest.mark.slow(reason="starts a cluster of three nodes and takes gradients on it")
def test_fit_with_a_killed_node_gives_what_one_machine_gives(nodes: Any, tmp_path: Path) -> None:
    write_plane_scenes(tmp_path / "scenes", scenes=3, views=3, size=28)
    model = build_backbone("vggt-nano", None)
    train = TrainConfig(
        frames=(2, 2), images_per_step=2, image_size=28, checkpointing=False, check_memory=False, device="cpu",
        threads=1,
    )  # fmt: skip
    subspace = write_subspace(tmp_path / "a.safetensors", model, 2, 0)
    config = FitConfig(tmp_path / "scenes", (subspace,), tmp_path / "here", batches=6, train=train)
    out = tmp_path / "there"
    killed: list[int] = []

    def kill_one() -> None:
        _until(lambda: list(out.glob(".gradients/*/[0-9]")))
        process = _until(_jobs)[0]
        _kill(nodes, _parent(process))
        assert not (out / "fit.json").exists(), "the gradients were taken before a node was killed"
        killed.append(process)

    watcher = threading.Thread(target=kill_one)
    for settings in (config, dataclasses.replace(config, out=out, ray=nodes.address)):
        if settings.ray:
            watcher.start()
        # whether random directions fit is not asked
        with contextlib.suppress(SystemExit):
            fit.run(settings)
    watcher.join()
    assert killed and read_json(out / "fit.json") == read_json(config.out / "fit.json")
    assert not (out / ".gradients").exists()


def _jobs() -> list[int]:
    """Processes that do a job on this machine at the moment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::_job"):
                found.append(int(folder.name))
    return found


def _fields(nodes: Any) -> GenerateConfig:
    return GenerateConfig(out=Path("unused"), ray=nodes.address)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="ascii").splitlines() if path.exists() else []


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".yaml"
    }


def _holder(lock: Path) -> int:
    """The process that has this file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(lock):
                return int(link.parts[2])
        except OSError:
            continue
    raise AssertionError(f"nobody holds {lock}")


def _parent(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return int(dict(line.split(":", 1) for line in status.splitlines())["PPid"])


class _Busy:
    """Set-up of a job whose folder another process holds at first."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.setups = 0

    def __call__(self, argument: object, worker: int) -> Callable[[str], object]:
        self.setups += 1

        def work(name: str) -> None:
            if self.refusals:
                self.refusals -= 1
                raise FolderInUse("out: another process is training")

        return work


def test_a_job_waits_for_a_folder_that_a_dying_process_still_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: None)
    busy = _Busy(refusals=2)
    assert cluster._job("first", __version__, busy, None, "name") == ("done", None)
    # what a refusal left behind is not used again, what a job that went well left is
    assert busy.setups == 3 and cluster._job("first", __version__, busy, None, "other") == ("done", None)
    assert busy.setups == 3
    monkeypatch.setattr(cluster, "_LET_GO_S", -1)
    failed = {"name": "out: another process is training"}
    assert cluster._job("second", __version__, _Busy(1), None, "name") == ("failed", failed)


def test_machines_with_another_version_are_refused() -> None:
    kind, message = cluster._job("third", "0.0.1", _Busy(0), None, "name")
    assert kind == "no start" and message == f"ray: every machine must have subspace3d 0.0.1, one has {__version__}"


@pytest.mark.parametrize("changes", [{"ray_cpus": 0}, {"ray_gpus": 1.5}, {"ray_gpus": -1.0}])
def test_needs_that_no_cluster_can_meet_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be"):
        GenerateConfig(out=Path("unused"), **changes)
