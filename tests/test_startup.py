"""Importing the package costs little beside timm: counted in modules, which don't depend on the machine."""

import json
import subprocess
import sys

CODE = """
import json, sys, timm
before = set(sys.modules)
import timm_tokens
print(json.dumps(sorted(set(sys.modules) - before)))
"""
KNOWN = {"PIL", "huggingface_hub", "numpy", "safetensors", "timm", "timm_tokens", "torch", "torchvision", "yaml"}


def test_the_package_imports_nothing_heavy_that_timm_does_not():
    output = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout
    added = json.loads(output)
    others = {module.split(".")[0] for module in added} - KNOWN - sys.stdlib_module_names
    assert not {name for name in others if not name.startswith("_")}
    assert sum(not module.startswith("timm_tokens") for module in added) < 100
