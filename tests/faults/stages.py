"""The stages at the smallest scale, what each needs and leaves, and how two runs of one are compared."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

_TRAIN = (
    "--train.steps 3 --train.frames 2 2 --train.images-per-step 2 --train.image-size 28 --train.save-every 1 "
    "--train.no-checkpointing --train.no-check-memory --train.threads 1"
)
COMMANDS = {
    "generate": "generate --out scenes --datasets 2 --scenes 2 --views 2 --resolution 28 --spp 1 --workers 1 --seed 3",
    "adapt": f"adapt --scenes scenes --out adapters --rank 2 --workers 1 {_TRAIN}",
    "mine": "mine --adapters adapters --k 2 --out subspaces/texture.safetensors",
    "analyze": "analyze --subspaces subspaces --out analysis",
    "finetune": f"finetune --scenes scenes --out tuned/subspace --method subspace --subspaces subspaces {_TRAIN}",
    "evaluate": "evaluate --scenes scenes/texture_00 --out evaluation --tuned tuned/subspace --frames 2",
    "report": "report --run .",
    "convert": "convert --from images --root scenes/texture_00/scene_0000 --out converted --name photos",
    "export": "export --run tuned/subspace --out exported/lora",
    "adapt --together": f"adapt --scenes scenes --out together --together 2 --rank 2 --workers 1 {_TRAIN}",
    "adapt --gradient-only": (
        f"adapt --scenes scenes --out gradients --gradient-only --gradient-steps 1 --rank 2 --workers 1 {_TRAIN}"
    ),
    "mine --join": "mine --adapters adapters --join gradients --k 2 --out joined/texture.safetensors",
    "fit": f"fit --scenes scenes --subspaces joined --out fit --batches 2 {_TRAIN}",
    "analyze --compare": "analyze --compare subspaces subspaces --out comparison",
    "finetune --few": (
        f"finetune --few --scenes scenes/texture_00/scene_0000 --method psv --core-size 2 --out few {_TRAIN}"
    ),
}
"""Stage -> command line, in a run folder that holds the results of the stages it needs."""
_RESULTS = {
    "generate": "scenes", "adapt": "adapters", "mine": "subspaces", "analyze": "analysis", "finetune": "tuned",
    "evaluate": "evaluation", "report": "report", "convert": "converted", "export": "exported",
    "adapt --together": "together", "adapt --gradient-only": "gradients", "mine --join": "joined", "fit": "fit",
    "analyze --compare": "comparison", "finetune --few": "few",
}  # fmt: skip
_IN_A_ROW = ("generate", "adapt", "mine", "analyze", "finetune", "evaluate", "report")
_NEEDS = {
    **{verb: _IN_A_ROW[:number] for number, verb in enumerate(_IN_A_ROW)},
    "convert": ("generate",), "export": ("finetune",), "adapt --together": ("generate",),
    "adapt --gradient-only": ("generate",), "mine --join": ("adapt", "adapt --gradient-only"),
    "fit": ("generate", "mine --join"), "analyze --compare": ("mine",), "finetune --few": ("generate",),
}  # fmt: skip
# what may differ between two runs of the same: times, memory and what depends on the time of writing
_VOLATILE = {
    "seconds", "finished", "peak_memory_bytes", "inference_seconds", "key", "tuned", "files", "environment",
    "icp_inlier_rmse",  # Open3D's threads add up in any order
}  # fmt: skip


def stages(*fast: str) -> list[Any]:
    """All stages as parameters; those that are not ``fast`` are marked slow, because together they take minutes."""
    return [verb if verb in fast else pytest.param(verb, marks=pytest.mark.slow) for verb in COMMANDS]


class Server:
    """A process of `faults.server`, see there."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def run(self, verb: str, folder: Path, log_to: Path | None = None, **how: Any) -> Outcome:
        log = (log_to or folder.parent) / f"{folder.name}.log"
        log.touch()  # a kill may come before the process has opened it
        order = {"folder": str(folder), "arguments": COMMANDS[verb].split(), "log": str(log), **how}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Outcome(**self._answer(), text=log.read_text(errors="replace"))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@dataclasses.dataclass(frozen=True)
class Outcome:
    code: int
    seconds: float
    operations: int
    text: str


class Reference:
    """An undisturbed run, each stage made when it is first asked for."""

    def __init__(self, server: Server, folder: Path) -> None:
        folder.mkdir()
        self.folder, self._server = folder, server
        self._outcomes: dict[str, Outcome] = {}

    def outcome(self, verb: str) -> Outcome:
        """What the stage took."""
        if verb not in self._outcomes:
            for name in _NEEDS[verb]:
                self.outcome(name)
            self._outcomes[verb] = self._server.run(verb, self.folder)
            assert self._outcomes[verb].code == 0, self._outcomes[verb].text
        return self._outcomes[verb]

    def start(self, verb: str, folder: Path) -> Path:
        """A run folder in which the stages that ``verb`` needs are done."""
        self.outcome(verb)
        folder.mkdir(parents=True)
        for name in _NEEDS[verb]:
            shutil.copytree(self.folder / _RESULTS[name], folder / _RESULTS[name])
        return folder

    def check(self, verb: str, folder: Path) -> None:
        """The stage has ended in ``folder`` as it did undisturbed, and left nothing temporary."""
        self.outcome(verb)
        expected, found = contents(self.folder / _RESULTS[verb]), contents(folder / _RESULTS[verb])
        assert found.keys() == expected.keys()
        different = [name for name, value in expected.items() if found[name] != value]
        assert not different, f"{verb}: {different} differ"
        left = [path for path in folder.rglob("*") if ".tmp" in path.name or path.name.endswith((".old", "lock"))]
        assert not left, f"{verb}: {left} were left behind"


def contents(folder: Path) -> dict[str, Any]:
    """File -> what is in it, without what depends on the time; hidden files are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() or any(part.startswith(".") for part in name.parts):
            continue
        found[str(name)] = _content(path)
    return found


def check_whole(folder: Path) -> None:
    """Nothing partial stands under a final name: whatever is there can be read to its end."""
    contents(folder)


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return {name: (tensor.dtype, tensor.tolist()) for name, tensor in load_file(path).items()}
    if path.suffix == ".json":
        return _stable(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        # of a run that was killed while it wrote, the last line may be half
        lines = path.read_text().splitlines(keepends=True)
        return [_stable(json.loads(line)) for line in lines if line.endswith("\n")]
    if path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as image:
            return image.size, image.tobytes()
    if path.suffix == ".html":
        text = path.read_text()
        assert text.endswith("</html>\n")
        return text.count("<section")
    return path.read_bytes()


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in _VOLATILE}
    return [_stable(item) for item in value] if isinstance(value, list) else value
