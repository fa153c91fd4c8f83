"""Runs under transformers 4: what a GGUF holds, as a JSON line. `python read_gguf.py LLAMA_CPP FILE`."""

import hashlib
import json
import sys

sys.path.insert(0, f"{sys.argv[1]}/gguf-py")

from gguf import GGUFReader

reader = GGUFReader(sys.argv[2])
fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
tensors = {tensor.name: hashlib.sha256(tensor.data.tobytes()).hexdigest() for tensor in reader.tensors}
print(json.dumps({"fields": fields, "tensors": tensors}))
