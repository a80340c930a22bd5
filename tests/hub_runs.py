"""What tests of published models share: code that loads one, and a process in which this package is not found."""

import os
import re
import subprocess
import sys

from trainers.loading_cost import WITHOUT_PACKAGE

# prints the module and the weights of what it loads; its arguments are a folder or an id, and a revision
LOAD = """
import json, sys
import torch
from PIL import Image
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
                          AutoModelForPreTraining, pipeline)

place, remote = sys.argv[1], {"trust_remote_code": True, "revision": sys.argv[2]}
picture = Image.new("RGB", (40, 30), (200, 100, 50))
processor = AutoImageProcessor.from_pretrained(place, revision=sys.argv[2])
pixel_values = processor(picture, return_tensors="pt").pixel_values
assert AutoConfig.from_pretrained(place, **remote).model_type == "cjepa"
model, info = AutoModel.from_pretrained(place, output_loading_info=True, **remote)
assert not info["missing_keys"] and not info["unexpected_keys"], info
whole, info = AutoModelForPreTraining.from_pretrained(place, output_loading_info=True, **remote)
assert not info["missing_keys"] and not info["unexpected_keys"], info
classifier = AutoModelForImageClassification.from_pretrained(place, num_labels=3, **remote)
assert classifier(pixel_values).logits.shape == (1, 3)
embedding = model(pixel_values).pooler_output
features = pipeline("image-feature-extraction", model=place, pool=True, **remote)(picture)
torch.testing.assert_close(torch.tensor(features), embedding)
classes = pipeline("image-classification", model=place, **remote)(picture)
assert len(classes) == 2, classes
print(json.dumps({
    "module": type(whole).__module__, "embedding": embedding.tolist(),
    "weights": {name: tensor.double().sum().item() for name, tensor in whole.state_dict().items()},
}))
"""


def without_package(code, tmp_path, hub, *arguments, expect=0) -> str:
    """What code prints in a process that does not find this package."""
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_PACKAGE + code)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= hub.environment(tmp_path / "home") | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == expect, done.stderr
    return done.stdout


def snippet_of(files) -> str:
    """The first piece of code of a repository's card."""
    return re.search(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL).group(1)


def files_of(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
