"""Write the result of a fine-tuning run in a format that other software loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from subspace3d import outputs
from subspace3d.log import logger


@dataclass(frozen=True)
class ExportConfig:
    """Write the result of a fine-tuning run in a format that other software loads."""

    run: Path
    """Run folder of finetune."""
    to: Literal["lora", "authors"] = "lora"
    """lora: one plain PEFT LoRA with the same outputs. authors: the basis as the authors' .A/.B file, without cores."""
    backbone: str = ""
    """Of a run on package.module:factory its name once more: a run folder alone starts no code from elsewhere."""
    out: Path | None = None
    """What to write; none: RUN/export/lora or RUN/export/basis.safetensors."""

    def lock(self) -> tuple[Path, str]:
        """What is written alone."""
        return (self.run, "export") if self.out is None else (self.out.parent, self.out.name)

    @property
    def target(self) -> Path:
        """What is written."""
        return self.out or self.run / "export" / ("lora" if self.to == "lora" else "basis.safetensors")

    def reads(self) -> list[tuple[str, Path]]:
        return outputs.named(run=outputs.tuned_folders([self.run]))

    def writes(self) -> list[outputs.Output]:
        return [outputs.Output("out", self.target, outputs.EXPORTED if self.to == "lora" else outputs.TENSORS)]


def run(config: ExportConfig) -> Path:
    """Write what ``config.to`` says and print where; returns the path."""
    from subspace3d.training.export import export_authors, export_lora

    config = outputs.check(config)
    if config.to == "lora":
        path = export_lora(config.run, config.target, config.backbone)
        logger.info(f"{path}: plain LoRA, PeftModel.from_pretrained(model, {str(path)!r})")
    else:
        path = export_authors(config.run, config.target)
        logger.info(
            f"{path}: the basis as .A and .B; this layout has no place for the trained cores and the heads' LoRA"
        )
    return path
