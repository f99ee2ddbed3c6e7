#!/usr/bin/env python3
"""A stand-in for `vllm serve`: writes down how it was started and what it is asked, and streams made-up tokens as vLLM
0.32 does. What it says depends on the model's name and the prompt alone."""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def main() -> None:
    notes = Path(os.environ["FAKE_VLLM_NOTES"])
    if os.environ.get("FAKE_VLLM_FAILS"):
        sys.exit("no such GPU")
    port = int(sys.argv[sys.argv.index("--port") + 1])
    notes.write_text(json.dumps({"arguments": sys.argv[1:], "key": os.environ["VLLM_API_KEY"]}) + "\n")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with notes.open("a") as lines:
                lines.write(json.dumps({"key": self.headers["authorization"], **body}) + "\n")
            if body["prompt"][0] == 63:
                self.send_response(400)
                self.end_headers()
                self.wfile.write(b"refused")
                return
            self.send_response(200)
            self.end_headers()
            for step in range(body["max_tokens"]):
                for answer in range(body["n"]):
                    token = 70 + (len(body["model"]) + sum(body["prompt"]) + step + answer) % 20
                    told = {"token_logprobs": [-0.5], "top_logprobs": [{f"token_id:{token}": -0.5, "token_id:5": -1.0}]}
                    last = step + 1 == body["max_tokens"]
                    choice = {"index": answer, "text": chr(token), "token_ids": [token]}
                    choice |= {"logprobs": told if body["logprobs"] is not None else None}
                    choice |= {"finish_reason": "length" if last else None}
                    if body["prompt"][0] == 62 and step == 2:  # breaks off
                        return
                    self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
