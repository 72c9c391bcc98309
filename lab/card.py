"""README.md for a run's folder, as the hub reads it: python lab/card.py RUN ...

Base and its licence, how to load the LoRA, the last figures and the settings; then
`hf upload OWNER/NAME RUN` takes the folder as it is. A README.md that is there is not replaced.
"""
import json
import os
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import drpo  # noqa: E402
import rewards  # noqa: E402
from curve import read_metrics  # noqa: E402

TEXT = """---
license: other
library_name: diffusers
tags: [lora, text-to-image]
{known}{widget}---
A LoRA for {base}, whose licence holds for it, tuned by Drifting Preference Optimization
(arXiv 2606.02521). {figures}

    pipe.load_lora_weights("THIS_REPO")
    pipe(prompt, num_inference_steps=1, guidance_scale=0{timesteps}).images[0]

Settings: `{settings}`
"""
WIDGET = """widget:
- text: "above the base, below the LoRA"
  output: {{url: samples/{picture}}}
"""


def card(folder):
    """Text of a run's README.md. UserError: no run, or one without a step."""
    settings = drpo.read_config(folder)
    metrics = read_metrics(folder)
    if not metrics:
        raise rewards.UserError(f"{folder}: no step is made yet")
    base = drpo.MODELS.get(settings["model"], settings["model"])
    base = Path(base).name if os.path.isabs(base) else base
    pictures = sorted((Path(folder) / "samples").glob("step-*.png"))
    own = {name: value for name, value in settings.items()
           if not re.search("(^|@)/", str(value))}  # nobody's folders are published
    t = settings["timestep"]
    return TEXT.format(
        base=base, known=f"base_model: {base}\n" if "/" in base else "",
        widget=WIDGET.format(picture=pictures[-1].name) if pictures else "",
        figures=drpo.figures_line(metrics[-1], settings["steps"]),
        timesteps=f", timesteps=[{t}]" if t >= 0 else "", settings=json.dumps(own))


if __name__ == "__main__":
    with rewards.one_line_errors():
        if len(sys.argv) < 2:
            raise rewards.UserError("name a run's folder")
        for run in sys.argv[1:]:
            path = Path(run) / "README.md"
            if path.exists():
                raise rewards.UserError(f"{path} is there already; expected none")
            rewards.write_atomic(path, card(run))
            print(f"written: {path}")
