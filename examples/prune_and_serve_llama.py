"""Prune a Llama-like model with grouped queries, one query head at a time, and serve what is left over HTTP.

    python examples/prune_and_serve_llama.py                 # a small one, trained on made-up reviews in seconds
    python examples/prune_and_serve_llama.py --model FOLDER --text calibration.txt --prompt "Once upon a time"
    python examples/prune_and_serve_llama.py --port 8000     # goes on serving: curl localhost:8000 -d "3 stars : the tea"

The groups that are left are ragged: some key/value heads serve two query heads, some one. Stock attention refuses them; headprune
runs them as they are, also from its checkpoint. For vLLM or llama.cpp: headprune export FOLDER --to vllm | gguf.
"""

import argparse
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

from quick_models import language_model, your_language_model, your_model
from rich import print

import headprune as hp
from headprune.evaluation import Perplexity

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, help="folder of a causal language model with its tokenizer")
parser.add_argument("--text", type=Path, help="text for --model: the first half calibrates, the second measures")
parser.add_argument("--heads", type=float, default=0.5, help="fraction of the query heads to remove")
parser.add_argument("--output", type=Path, default=Path("pruned-llama"))
parser.add_argument("--prompt", default="3 stars : the soup was")
parser.add_argument("--port", type=int, help="serve here until Ctrl-C; by default one prompt is asked and answered")
args = parser.parse_args()

given = your_language_model(args.model, args.text) if args.model else language_model()
model, tokenizer, batches, text = given
batches, test = batches[:12], Perplexity(text, tokenizer, window=batches[0]["input_ids"].shape[1])

before = hp.evaluate(model, test, repeats=3)
plan = hp.plan(hp.score(model, batches, criterion="fisher"), hp.Budget(heads=args.heads))
print(plan)
hp.prune(model, plan, calibration=batches)
hp.save(model, args.output, tokenizer=tokenizer)

served, tokenizer = your_model(args.output)
for site in hp.attention_sites(served):
    print(f"{site.name}: query heads of each key/value head: {', '.join(map(str, site.head_map.group_sizes))}")
after = hp.evaluate(served, test, repeats=3)
print(f"perplexity: dense {before.quality['perplexity']:.3f}, pruned {after.quality['perplexity']:.3f}")
print(f"cache: {before.kv_cache_bytes_per_token} -> {after.kv_cache_bytes_per_token} bytes per token")


def answer(prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = served.generate(**inputs, max_new_tokens=18, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


class Service(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        prompt = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer(prompt).encode())

    def log_message(self, *_: object) -> None:
        pass


with ThreadingHTTPServer(("127.0.0.1", args.port or 0), Service) as server:
    address = f"http://127.0.0.1:{server.server_port}"
    print(f"serving {args.output} at {address}")
    if args.port:
        server.serve_forever()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"answer: {urlopen(address, args.prompt.encode()).read().decode()}")
        server.shutdown()
