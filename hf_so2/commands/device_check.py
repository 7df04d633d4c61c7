"""Is training on a device as near to float64 as on a CPU, and how often does a step make the host wait for it?

    hf-so2 device-check --device cuda

Every method trains a small Llama from the same weights on the same tokens: on the CPU in float64, which is the
reference, and in each of --settings, on the CPU and on the device. What is printed is the relative error of everything
that was learned. Leaves device_check.json in --output_dir; the exit code is 1 where the device is further off than
four times what the CPU is in the same setting.
"""

from __future__ import annotations

import json
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from hf_so2.benchmark.device_check import CPU, REFERENCE, SETTINGS, STEPS, distance, learned, waits_of
from hf_so2.benchmark.report import markdown
from hf_so2.cli import parse, require_device
from hf_so2.errors import ConfigurationError
from hf_so2.folders import require_folder
from hf_so2.optim import OPTIMIZERS

# SOAP's and Adam's first steps are signs of small numbers, which differ wherever products are summed in another order.
ALLOWED, ROUND_OFF = 4.0, 1e-3


@dataclass
class DeviceCheckArguments:
    """What to check."""

    output_dir: str = field(default="out/device_check", metadata={"help": "where device_check.json goes"})
    optim: list[str] = field(
        default_factory=lambda: [name for name in OPTIMIZERS if not name.endswith("_mup")],
        metadata={"help": "optimizers of ours, without μP"},
    )
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "what to check: cpu or cuda"}
    )
    settings: list[str] = field(default_factory=lambda: list(SETTINGS), metadata={"help": "of training"})

    def __post_init__(self) -> None:
        for name in self.optim:
            if name not in OPTIMIZERS:
                raise ConfigurationError("optim", name, f"must be one of {', '.join(OPTIMIZERS)}")
        for name in self.settings:
            if name not in SETTINGS:
                raise ConfigurationError("settings", name, f"must be one of {', '.join(SETTINGS)}")
        require_device("device", self.device)


def main() -> int:
    """Checks, prints the tables, saves them."""
    (arguments,) = parse((DeviceCheckArguments,))
    output, device = Path(arguments.output_dir), torch.device(arguments.device)
    require_folder("output_dir", output)
    output.mkdir(parents=True, exist_ok=True)
    errors: dict[str, dict[str, float]] = {}
    waits: dict[str, dict[str, dict[str, int]]] = {}
    failed = []
    for name in arguments.optim:
        reference = learned(name, REFERENCE, CPU)
        errors[name] = {}
        for label in arguments.settings:
            setting = SETTINGS[label]
            on_cpu = distance(learned(name, replace(setting, compiled=False), CPU), reference)
            try:
                error = distance(learned(name, setting, device), reference)
            except Exception as problem:  # noqa: BLE001  # the others are still worth knowing
                traceback.print_exc()
                error = float("nan")
                failed.append(f"{name}, {label}: {type(problem).__name__}")
            errors[name][f"{label}, CPU"], errors[name][label] = on_cpu, error
            if error > ALLOWED * on_cpu + ROUND_OFF:
                failed.append(f"{name}, {label}: an error of {error:.2g} where the CPU has {on_cpu:.2g}")
        waits[name] = waits_of(name, device)
        print(f"{name}: " + ", ".join(f"{label} {error:.1e}" for label, error in errors[name].items()), flush=True)
    report = {"device": str(device), "torch": torch.__version__, "errors": errors, "waits": waits, "failed": failed}
    (output / "device_check.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    rows = [[name, *(f"{error:.1e}" for error in row.values())] for name, row in errors.items()]
    print(f"\nRelative error after {STEPS} steps\n\n" + markdown([["optimizer", *next(iter(errors.values()))], *rows]))
    rows = [[n, *(str(sum(w.values())) for w in kinds.values())] for n, kinds in waits.items()]
    header = ["optimizer", *next(iter(waits.values()))]
    print("\nHow often the host waits for the device\n\n" + markdown([header, *rows]))
    for name, kinds in waits.items():
        for kind, places in kinds.items():
            for place, count in places.items():
                print(f"{name}, {kind}: {count} × {place}")
    print("\n".join(failed) or "\nas near to float64 as the CPU")
    return 1 if failed else 0
