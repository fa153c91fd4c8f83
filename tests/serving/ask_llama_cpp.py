"""Runs where xllamacpp is installed: llama.cpp's own server answers requests about one model.

`python ask_llama_cpp.py JOB.json`. The job: `model`, `mmproj` (or null), and `requests`, each a path of the server and
a body. Prints a JSON line for each. The cache is in float32, as in the model that it is compared with.
"""

import json
import sys
import urllib.request
from pathlib import Path

import xllamacpp

job = json.loads(Path(sys.argv[1]).read_text())
parameters = xllamacpp.CommonParams()
parameters.model.path = job["model"]
if job["mmproj"]:
    parameters.mmproj.path = job["mmproj"]
parameters.n_ctx, parameters.n_parallel, parameters.verbosity = 1024, 1, -1
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
parameters.warmup = parameters.fit_params = parameters.mmproj_use_gpu = False
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(parameters)
for path, body in job["requests"]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        print(json.dumps(json.loads(answer.read())))
