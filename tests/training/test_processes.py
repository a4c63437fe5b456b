"""Several processes: torchrun, kill -9 and the pool of adapt."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from jobs.pool_work import note_process
from training import distributed_run, distributed_step, parting_processes
from training.plane_scenes import write_plane_scenes
from training.tiny import read_metrics, without_time

from subspace3d.cli import main
from subspace3d.commands import adapt
from subspace3d.commands.adapt import AdaptConfig
from subspace3d.files import load_tensors, read_json
from subspace3d.jobs.pool import run_jobs
from subspace3d.training import checkpoints
from subspace3d.training.config import TrainConfig
from subspace3d.training.stop import stop_requests

FLAGS = [
    *("--train.frames", "2", "2", "--train.image-size", "28", "--train.device", "cpu", "--train.threads", "1"),
    *("--train.no-checkpointing", "--train.no-check-memory", "--train.lr", "1e-3"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    for index, name in enumerate("abc"):
        write_plane_scenes(folder / "scenes" / name, scenes=3, views=3, seed=index)
    return folder


def _command(folder: Path, verb: str, out: Path, scenes: str, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "subspace3d", verb, "--scenes", str(folder / "scenes" / scenes), "--out", str(out)),
        *("--weights", "random", *FLAGS, *flags),
    ]


def _torchrun(*arguments: str, device: str = "cpu") -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SUBSPACE_TEST_DEVICE": device}
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_two_processes_are_those_of_the_joint_batch(folder: Path, tmp_path: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU for each of two processes is needed")
    scenes, script, folder = folder / "scenes/a", str(Path(distributed_step.__file__)), tmp_path
    distributed_step.main(scenes, folder / "alone")
    _torchrun(script, str(scenes), str(folder / "pair"), device=device)
    expected, _ = load_tensors(folder / "gradients-1-0.safetensors")
    for rank in (0, 1):
        found, _ = load_tensors(folder / f"gradients-2-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            # float32 sums over the same terms in another order, relative to the largest entry
            tolerance = 2e-5 * max(1e-3, float(gradient.abs().max()))
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=tolerance, msg=name)
    alone, pair = (read_metrics(folder / name)[0] for name in ("alone", "pair"))
    assert pair["images"] == alone["images"] == 9
    for name in ("loss", "depth_error", "camera", "regularizer", "gradient_norm_aggregator"):
        assert pair[name] == pytest.approx(alone[name], rel=1e-5, abs=2e-6), name


def test_finetune_under_torchrun(folder: Path, tmp_path: Path) -> None:
    arguments = _command(folder, "finetune", tmp_path / "pair", "a", "--method", "full", "--train.steps", "3")[1:]
    _torchrun(*arguments, "--train.images-per-step", "6", "--train.save-every", "2")
    record = read_json(tmp_path / "pair/tuned/tuned.json")
    assert record["training"]["steps"] == 3
    assert [line["step"] for line in read_metrics(tmp_path / "pair")] == [1, 2, 3]
    assert (tmp_path / "pair/checkpoints/step_3/extra.safetensors").is_file()
    rng, _ = load_tensors(tmp_path / "pair/checkpoints/step_3/extra.safetensors")
    assert sorted(rng) == ["rng.0.cpu", "rng.1.cpu"]


def test_a_run_continues_on_another_number_of_processes(folder: Path, tmp_path: Path, capfd) -> None:
    script, scenes = str(Path(distributed_run.__file__)), folder / "scenes/a"
    distributed_run.main(scenes, tmp_path / "alone")
    straight = without_time(read_metrics(tmp_path / "alone"))
    # cut off after step 4, so that both continue from step 3
    distributed_run.main(scenes, tmp_path / "grown", stop=4)
    _torchrun(script, str(scenes), str(tmp_path / "grown"))
    _torchrun(script, str(scenes), str(tmp_path / "shrunk"), "4")
    distributed_run.main(scenes, tmp_path / "shrunk")
    assert "step_3 was made by 2 processes, 1 continue" in capfd.readouterr().err
    for name, processes in (("grown", 2), ("shrunk", 1)):
        found = without_time(read_metrics(tmp_path / name))
        assert [line["step"] for line in found] == list(range(1, distributed_run.STEPS + 1))
        for line, expected in zip(found, straight):
            assert line["images"] == expected["images"] and line["lr"] == expected["lr"]
            # sums in another order, relative to terms of size 1 and carried through the steps before
            for term in ("loss", "camera", "depth", "gradient_norm_aggregator"):
                assert line[term] == pytest.approx(expected[term], rel=1e-4, abs=1e-5), (name, line["step"], term)
        state = read_json(tmp_path / name / f"checkpoints/step_{distributed_run.STEPS}/state.json")
        assert state["processes"] == processes
    # one process before and after: until it was cut off, the run that grew is the straight one
    assert without_time(read_metrics(tmp_path / "grown"))[:3] == straight[:3]


def test_processes_that_do_not_share_the_run_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    """As on two machines whose disks are their own: each process has a folder, one holds a checkpoint."""
    script = str(Path(distributed_run.__file__))
    distributed_run.main(folder / "scenes/a", tmp_path / "run-0", stop=4)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, script, str(folder / "scenes/a"), str(tmp_path / "run-{rank}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode != 0 and "they find checkpoints of steps [3, 0], by rank" in done.stderr


def _killed(command: list[str], when: Callable[[], bool]) -> None:
    """Start a command and kill -9 it as soon as ``when`` holds."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_finetune_killed_in_the_middle_ends_the_same(folder: Path, tmp_path: Path) -> None:
    flags = ["--method", "full", "--train.steps", "8", "--train.save-every", "3", "--train.images-per-step", "2"]
    run = tmp_path / "killed"
    command = _command(folder, "finetune", run, "a", *flags)
    _killed(command, lambda: (run / "checkpoints/step_3").is_dir())
    assert not (run / "tuned").exists()
    (run / "checkpoints/.step_9.s3d-abcdefgh.tmp").mkdir()  # what a kill while saving leaves
    subprocess.run([*command, "--resume", "auto"], check=True, capture_output=True)
    straight = tmp_path / "straight"
    main(_command(folder, "finetune", straight, "a", *flags)[3:])
    assert without_time(read_metrics(run)) == without_time(read_metrics(straight))
    weights = [path / "tuned/model.safetensors" for path in (run, straight)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_6", "step_8"]


@pytest.mark.slow(reason="starts the command twice")
def test_adapters_killed_together_end_the_same(folder: Path, tmp_path: Path) -> None:
    flags = ["--rank", "2", "--train.steps", "6", "--train.save-every", "2", "--train.images-per-step", "2"]
    out = tmp_path / "killed"
    command = _command(folder, "adapt", out, ".", "--together", "3", *flags)
    _killed(command, lambda: (out / ".work/b/checkpoints/step_2").is_dir())
    assert not any((out / name).exists() for name in "abc")
    subprocess.run(command, check=True, capture_output=True)
    adapt.run(_adapt_config(folder, tmp_path / "straight", together=3))
    for name in "abc":
        killed, straight = (
            load_tensors(path / name / "adapter_model.safetensors")[0] for path in (out, tmp_path / "straight")
        )
        # killed between the checkpoints of one step, those behind catch up alone, in other last bits, which AdamW's
        # first steps magnify where there is hardly a gradient
        differing = sum(int(((killed[key] - straight[key]).abs() > 1e-6).sum()) for key in straight)
        assert differing <= 1e-3 * sum(tensor.numel() for tensor in straight.values()), name
        assert [line["step"] for line in read_metrics(out / name)] == list(range(1, 7))
    assert not (out / ".work").exists()


def test_adapt_killed_in_the_middle_ends_the_same(folder: Path, tmp_path: Path) -> None:
    flags = ["--rank", "2", "--train.steps", "6", "--train.save-every", "2", "--train.images-per-step", "2"]
    out = tmp_path / "killed"
    command = _command(folder, "adapt", out, ".", "--workers", "1", *flags)
    _killed(command, lambda: (out / ".work/b/checkpoints/step_2").is_dir())
    first = (out / "a/adapter_model.safetensors").stat().st_mtime_ns
    assert not (out / "c").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert (out / "a/adapter_model.safetensors").stat().st_mtime_ns == first
    adapt.run(_adapt_config(folder, tmp_path / "straight"))
    for name in "abc":
        killed, straight = (path / name / "adapter_model.safetensors" for path in (out, tmp_path / "straight"))
        assert killed.read_bytes() == straight.read_bytes(), name
        assert [line["step"] for line in read_metrics(out / name)] == list(range(1, 7))
    assert not (out / ".work").exists()


def _adapt_config(folder: Path, out: Path, **changes) -> AdaptConfig:
    train = TrainConfig(
        steps=6,
        lr=1e-3,
        frames=(2, 2),
        images_per_step=2,
        image_size=28,
        save_every=2,
        checkpointing=False,
        check_memory=False,
        device="cpu",
        threads=1,
    )
    return AdaptConfig(scenes=folder / "scenes", out=out, weights=Path("random"), rank=2, train=train, **changes)


@pytest.mark.parametrize(("workers", "together"), [(2, 1), (1, 2)])
def test_failed_adapters_are_listed_and_the_others_finish(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture, workers: int, together: int
) -> None:
    for index, name in enumerate("ab"):
        write_plane_scenes(tmp_path / "scenes" / name, scenes=1, views=2, seed=index)
    broken = tmp_path / "scenes/b/scene_0000/images/0001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    config = _adapt_config(folder, tmp_path / "out", workers=workers, together=together)
    config = dataclasses.replace(
        config,
        scenes=tmp_path / "scenes",
        train=dataclasses.replace(config.train, steps=2),
    )
    with pytest.raises(SystemExit) as end:
        adapt.run(config)
    assert end.value.code == 1
    message = capfd.readouterr().err
    assert "1 of 2 adapters failed" in message and f"b: {broken} is not a whole image" in message
    assert [(tmp_path / "out" / name / "adapt.json").is_file() for name in "ab"] == [True, False]
    # mended and started again, in this process: only what is missing
    write_plane_scenes(tmp_path / "scenes/b", scenes=1, views=2, seed=1)
    finished = adapt.run(dataclasses.replace(config, workers=1))
    assert all((path / "adapt.json").is_file() for path in finished)


def test_pool_outlives_its_workers(tmp_path: Path) -> None:
    ended: list[str] = []
    failures = run_jobs(["one", "raises", "two", "dies", "three"], note_process, tmp_path, 1, ended.append)
    assert failures == {"raises": "no good", "dies": "its process died (exit code -9, out of memory?)"}
    assert ended == ["one", "raises", "two", "dies", "three"]
    processes = [(tmp_path / name).read_text() for name in ("one", "two", "three")]
    assert len(set(processes)) == 3 and str(os.getpid()) not in processes
    # two jobs a process
    assert run_jobs(["parts"], note_process, tmp_path, 1) == {"left": "no good", "right": "KeyError: 'x'"}
    run_jobs(["three", "four", "five", "six"], note_process, tmp_path, 1, recycle=2)
    processes = [(tmp_path / name).read_text() for name in ("three", "four", "five", "six")]
    assert processes[0] == processes[1] != processes[2] == processes[3]
    with pytest.raises(ValueError, match="weights: no such file"):
        run_jobs(["one"], note_process, tmp_path / "broken", 2)


def _part(folder: Path, times: int, limit: float) -> None:
    script = str(Path(parting_processes.__file__))
    pair = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(folder), str(times)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        texts = [process.communicate(timeout=limit)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert all(f"parted {times} times" in text for text in texts), texts


def test_processes_part(tmp_path: Path) -> None:
    _part(tmp_path, times=15, limit=150)


@pytest.mark.slow(reason="joins and parts two processes 500 times")
def test_processes_part_five_hundred_times(tmp_path: Path) -> None:
    _part(tmp_path, times=500, limit=1200)


@contextlib.contextmanager
def _two(command: list[str]) -> Iterator[list[subprocess.Popen]]:
    """Both processes of a run, without torchrun, which would end the one when the other ends."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    pair = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        yield pair
    finally:
        for process in pair:
            process.kill()


def test_a_lost_partner_ends_the_other_with_a_message(folder: Path, tmp_path: Path) -> None:
    """One of two processes is killed: the other ends within seconds, in one line, and its checkpoint is whole."""
    command = _command(folder, "finetune", tmp_path / "run", "a", "--method", "lora", "--rank", "2")
    command += ["--train.steps", "400", "--train.save-every", "2", "--train.images-per-step", "4"]
    with _two(command) as pair:
        deadline = time.monotonic() + 150
        while not list(tmp_path.glob("run/checkpoints/step_*/state.json")):
            assert time.monotonic() < deadline and all(process.poll() is None for process in pair)
            time.sleep(0.1)
        pair[1].kill()
        _, text = pair[0].communicate(timeout=60)
    assert pair[0].returncode == 2 and "another process of this run has ended" in text, text[-2000:]
    assert "Traceback" not in text
    newest = checkpoints.latest(tmp_path / "run/checkpoints")
    assert newest is not None and checkpoints.read_state(newest, ("step",))["step"] >= 2


def _whole_step(run: Path) -> int:
    """The step of the newest checkpoint, which another process can continue from."""
    newest = checkpoints.latest(run / "checkpoints")
    assert newest is not None
    for name in ("model", "optimizer", "extra"):
        load_tensors(newest / f"{name}.safetensors")
    return checkpoints.read_state(newest)["step"]


def test_an_exception_in_one_process_ends_the_other_with_a_message(folder: Path, tmp_path: Path) -> None:
    script = str(Path(distributed_run.__file__))
    with _two([sys.executable, script, str(folder / "scenes/a"), str(tmp_path / "run"), "4", "fails"]) as pair:
        texts = [process.communicate(timeout=100)[1] for process in pair]
    assert "this process has a fault of its own" in texts[1], texts[1][-2000:]
    assert "another process of this run has ended" in texts[0], texts[0][-2000:]
    assert all(process.returncode == 1 for process in pair)
    assert _whole_step(tmp_path / "run") == 3
    distributed_run.main(folder / "scenes/a", tmp_path / "run")
    assert _whole_step(tmp_path / "run") == distributed_run.STEPS


def test_a_signal_to_one_process_stops_both_after_the_step(folder: Path, tmp_path: Path) -> None:
    script = str(Path(distributed_run.__file__))
    with _two([sys.executable, script, str(folder / "scenes/a"), str(tmp_path / "run"), "4", "signal"]) as pair:
        texts = [process.communicate(timeout=100)[1] for process in pair]
    assert [process.returncode for process in pair] == [143, 143], texts
    assert "stopped after step" in texts[0] and "Traceback" not in "".join(texts)
    assert _whole_step(tmp_path / "run") in (4, 5)  # the signal may come after the processes have asked each other


def test_a_second_signal_ends_a_run_at_once() -> None:
    with pytest.raises(SystemExit) as end, stop_requests() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        assert received == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert end.value.code == 143
    with pytest.raises(KeyboardInterrupt), stop_requests() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
