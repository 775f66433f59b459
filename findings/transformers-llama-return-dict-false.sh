#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0, CPU: a Llama whose configuration says return_dict=False cannot run.
#
# Expected: return_dict=False in the configuration makes a model's forward return a tuple, as the argument of that name does.
# Seen: LlamaForCausalLM and GPT2LMHeadModel raise AttributeError, 'tuple' object has no attribute 'last_hidden_state':
# their inner model obeys the configuration, and they read its output as one that has names. With the argument the same
# model returns a tuple, and BertForMaskedLM does with either.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5 transformers==5.24.0

cat > "$folder/program.py" <<'PY'
import torch
import transformers as hf

hf.logging.set_verbosity_error()
ids = torch.arange(3, 11)[None]
sizes = dict(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
KINDS = {
    "Llama": lambda **more: hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, intermediate_size=8, **more)),
    "GPT2": lambda **more: hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **more)),
    "Bert": lambda **more: hf.BertForMaskedLM(hf.BertConfig(**sizes, intermediate_size=8, **more)),
}
for name, make in KINDS.items():
    said = [type(make()(input_ids=ids, return_dict=False)).__name__]
    try:
        said.append(type(make(return_dict=False)(input_ids=ids)).__name__)
    except AttributeError as error:
        said.append(f"AttributeError: {error}")
    print(f"SEEN {name}: by the argument {said[0]}, by the configuration {said[1]}")
PY

"$folder/venv/bin/python" "$folder/program.py" | tee "$folder/output"
error="AttributeError: 'tuple' object has no attribute 'last_hidden_state'"
grep -q "^SEEN Llama: by the argument tuple, by the configuration $error$" "$folder/output"
grep -q "^SEEN GPT2: by the argument tuple, by the configuration $error$" "$folder/output"
grep -q "^SEEN Bert: by the argument tuple, by the configuration tuple$" "$folder/output"
echo "as found"
