"""Runs where mlx-vlm is installed: the logits of a converted model. `python open_mlx.py FOLDER INPUTS.npz`.

The inputs are those of transformers' processor: that of mlx-vlm 0.7.10 does not work beside transformers 5.24.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy
from mlx_vlm.utils import load_model

inputs = {name: mx.array(value) for name, value in numpy.load(sys.argv[2]).items()}
answer = load_model(Path(sys.argv[1]))(inputs["input_ids"], pixel_values=inputs["pixel_values"], mask=None)
print(json.dumps({"logits": numpy.array(answer.logits)[0].tolist()}))
