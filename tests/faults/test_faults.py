"""Full disks, targets that cannot be written, damaged files, a second process, little memory and a wrong clock.

After each: a message in one line, an exit code, nothing partial, and the same command then ends as if nothing had been.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.stages import COMMANDS, Reference, Server, check_whole, stages

SCRIPT = Path(sys.executable).with_name("subspace3d")
LOCKS = {
    "generate": "scenes/.texture.lock", "adapt": "adapters/.lock", "mine": "subspaces/.texture.safetensors.lock",
    "analyze": "analysis/.lock", "finetune": "tuned/subspace/.lock", "evaluate": "evaluation/.lock",
    "report": ".report.lock", "convert": "converted/.photos.lock", "export": "exported/.lora.lock",
    "adapt --together": "together/.lock", "adapt --gradient-only": "gradients/.lock",
    "mine --join": "joined/.texture.safetensors.lock", "fit": "fit/.lock", "analyze --compare": "comparison/.lock",
    "finetune --few": "few/.lock",
}  # fmt: skip


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A file system of its own at ``folder``, where this user may make one; says whether it did."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m"]
    mounted = not subprocess.run(["mount", *options, "tmpfs", str(folder)], capture_output=True, check=False).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Write a file of zeros that leaves ``leave`` bytes free."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        file.truncate(max(0, file.tell() - leave))
    return ballast


def slow(*values: str):
    return pytest.param(*values, marks=pytest.mark.slow)


def is_one_line(text: str) -> bool:
    return "Traceback" not in text


@pytest.mark.parametrize("verb", stages("mine"))
def test_full_disk(server: Server, reference: Reference, verb: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as mounted:
        folder = reference.start(verb, tmp_path / "disk/run")
        if mounted:
            ballast = fill(tmp_path / "disk", 4096)
            full = server.run(verb, folder, log_to=tmp_path)
            ballast.unlink()
        else:
            # the kernel refuses the write in the middle of the file, as a full disk does
            full = server.run(verb, folder, log_to=tmp_path, file_bytes=500)
        assert full.code in (1, 2) and is_one_line(full.text), full.text
        assert os.strerror(errno.ENOSPC if mounted else errno.EFBIG) in full.text
        check_whole(folder)
        again = server.run(verb, folder, log_to=tmp_path)
        assert again.code == 0, again.text
        reference.check(verb, folder)


@pytest.mark.parametrize("verb", stages("mine"))
def test_target_that_cannot_be_written(server: Server, reference: Reference, verb: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as mounted:
        if not mounted and os.geteuid() == 0:
            pytest.fail("root may write everywhere, and no file system can be mounted here")
        folder = reference.start(verb, tmp_path / "disk/run")
        _set_writable(tmp_path / "disk", mounted, False)
        refused = server.run(verb, folder, log_to=tmp_path)
        _set_writable(tmp_path / "disk", mounted, True)
        assert refused.code in (1, 2) and is_one_line(refused.text), refused.text
        assert os.strerror(errno.EROFS if mounted else errno.EACCES) in refused.text
        again = server.run(verb, folder, log_to=tmp_path)
        assert again.code == 0, again.text
        reference.check(verb, folder)


def _set_writable(folder: Path, mounted: bool, writable: bool) -> None:
    if mounted:
        options = f"remount,{'rw' if writable else 'ro'}"
        subprocess.run(["mount", "-o", options, str(folder)], check=True)
    else:
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755 if writable else 0o555)


def truncated(content: bytes) -> bytes:
    return content[: 2 * len(content) // 3]


def flipped(content: bytes) -> bytes:
    """One bit near the end, in the values of tensors and the data of images."""
    at = len(content) - 30
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def damage_and_mend(server: Server, folder: Path, verb: str, name: str, damage: Callable[[bytes], bytes]) -> None:
    """Damage the files that ``name`` matches, run, put them back, run again."""
    originals = {path: path.read_bytes() for path in folder.glob(name)}
    assert originals
    for path, content in originals.items():
        path.write_bytes(damage(content))
    refused = server.run(verb, folder)
    assert refused.code in (1, 2) and is_one_line(refused.text), refused.text
    assert any(str(path.relative_to(folder)) in refused.text for path in originals), refused.text
    for path, content in originals.items():
        path.write_bytes(content)
    again = server.run(verb, folder)
    assert again.code == 0, again.text


@pytest.mark.parametrize("damage", [truncated, flipped])
@pytest.mark.parametrize(
    ("verb", "name"),
    [
        slow("adapt", "scenes/*/*/images/0000.png"),
        slow("finetune", "scenes/*/*/depth/0001.png"),
        ("finetune", "subspaces/texture.safetensors"),
        slow("analyze", "subspaces/texture.safetensors"),
        slow("evaluate", "tuned/subspace/tuned/basis.safetensors"),
        slow("evaluate", "tuned/subspace/tuned/adapter/adapter_model.safetensors"),
    ],
)
def test_damaged_input_is_named(
    server: Server, reference: Reference, verb: str, name: str, damage, tmp_path: Path
) -> None:
    damage_and_mend(server, reference.start(verb, tmp_path / "run"), verb, name, damage)
    reference.check(verb, tmp_path / "run")


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        slow("adapt", "scenes/*/*/scene.json"),
        ("mine", "adapters/texture_00/adapter_config.json"),
        ("mine", "adapters/texture_01/adapter_model.safetensors"),
        slow("evaluate", "tuned/subspace/tuned/tuned.json"),
        slow("report", "evaluation/results.json"),
    ],
)
def test_truncated_input_is_named(server: Server, reference: Reference, verb: str, name: str, tmp_path: Path) -> None:
    """Formats of others, and plain text, have no checksum: a changed digit is another number."""
    damage_and_mend(server, reference.start(verb, tmp_path / "run"), verb, name, truncated)
    reference.check(verb, tmp_path / "run")


@pytest.mark.parametrize("content", [b"steps: [", b"\xff\xfe", b"- 1\n"])
def test_damaged_settings_of_an_earlier_run_are_named(
    server: Server, reference: Reference, content: bytes, tmp_path: Path
) -> None:
    folder = reference.start("adapt", tmp_path / "run")
    record = folder / "scenes/config-texture.yaml"
    original = record.read_bytes()
    record.write_bytes(content)
    refused = server.run("generate", folder)
    assert refused.code == 2 and is_one_line(refused.text) and record.name in refused.text, refused.text
    record.write_bytes(original)
    assert server.run("generate", folder).code == 0
    reference.check("generate", folder)


@pytest.mark.slow  # runs a stage to its end twice
def test_a_scene_that_was_damaged_is_measured_once_it_is_whole(
    server: Server, reference: Reference, tmp_path: Path
) -> None:
    folder = reference.start("evaluate", tmp_path / "run")
    image = folder / "scenes/texture_00/scene_0001/images/0001.png"
    original = image.read_bytes()
    image.write_bytes(flipped(original))
    assert server.run("evaluate", folder).code == 0
    assert "0001.png is not a whole image" in (folder / "evaluation/results.json").read_text()
    image.write_bytes(original)
    again = server.run("evaluate", folder)
    assert again.code == 0, again.text
    reference.check("evaluate", folder)


@pytest.mark.parametrize("damage", [truncated, flipped])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    server: Server, reference: Reference, damage, tmp_path: Path
) -> None:
    folder = reference.start("finetune", tmp_path / "run")
    shutil.copytree(reference.folder / "tuned/subspace", folder / "tuned/subspace")
    shutil.rmtree(folder / "tuned/subspace/tuned")
    newest = folder / "tuned/subspace/checkpoints/step_3/model.safetensors"
    newest.write_bytes(damage(newest.read_bytes()))
    outcome = server.run("finetune", folder)
    assert outcome.code == 0 and "going back to the checkpoint before it" in outcome.text, outcome.text
    reference.check("finetune", folder)


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_second_process_is_refused(server: Server, verb: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lock = folder / LOCKS[verb]
    lock.parent.mkdir(parents=True, exist_ok=True)
    before = sorted(folder.rglob("*"))
    with open(lock, "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused = server.run(verb, folder)
        assert refused.code == 2 and "another process is at work on" in refused.text, refused.text
        assert sorted(folder.rglob("*")) == sorted([*before, lock])


@pytest.mark.parametrize("verb", stages("mine"))
def test_two_at_a_time(server: Server, reference: Reference, verb: str, tmp_path: Path) -> None:
    folder = reference.start(verb, tmp_path / "run")
    outcome = server.run(verb, folder, twins=True)
    assert outcome.code in (0, 2), outcome.text
    reference.check(verb, folder)


@pytest.mark.slow  # seconds each, as all of these together take minutes
@pytest.mark.parametrize("verb", ["adapt", "finetune"])
def test_little_memory(server: Server, reference: Reference, verb: str, tmp_path: Path) -> None:
    folder = reference.start(verb, tmp_path / "run")
    starved = server.run(verb, folder, spare_bytes=1 << 23)
    assert starved.code in (1, 2) and is_one_line(starved.text), starved.text
    assert "memory" in starved.text
    check_whole(folder)
    again = server.run(verb, folder)
    assert again.code == 0, again.text
    reference.check(verb, folder)


@pytest.mark.slow  # three stages to their end
@pytest.mark.parametrize("jump", [-1e8, 1e8])
def test_a_clock_that_jumps(server: Server, reference: Reference, jump: float, tmp_path: Path) -> None:
    """By three years at every look, while files carry times of the other side, and with a kill in between."""
    folder = reference.start("finetune", tmp_path / "run")
    for path in folder.rglob("*"):
        os.utime(path, (1e9 - jump, 1e9 - jump))
    operations = reference.outcome("finetune").operations
    assert server.run("finetune", folder, clock=jump, kill_at=operations // 2).code == -signal.SIGKILL
    for verb in ("finetune", "evaluate", "report"):
        outcome = server.run(verb, folder, clock=jump)
        assert outcome.code == 0, outcome.text
        reference.check(verb, folder)


@pytest.mark.slow  # starts a renderer in two processes of its own
def test_rendering_processes_end_with_the_one_that_started_them(reference: Reference, tmp_path: Path) -> None:
    command = COMMANDS["generate"].replace("--workers 1", "--workers 2").split()
    first = subprocess.Popen([str(SCRIPT), *command], cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("scenes/*/scene_*/scene.json")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    first.kill()
    first.wait()
    while _processes_of_session(first.pid):
        assert time.monotonic() < deadline, "a rendering process outlives its parent"
        time.sleep(0.1)
    # as the reference was rendered, for the settings that are written say how many processes there were
    subprocess.run([str(SCRIPT), *COMMANDS["generate"].split()], cwd=tmp_path, check=True)
    reference.check("generate", tmp_path)


def _processes_of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    found.append(int(entry.name))
    return found
