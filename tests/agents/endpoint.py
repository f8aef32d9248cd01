"""A small OpenAI-compatible endpoint in a thread: its answers are a function of the request's body."""

import http.server
import json
import threading
from collections.abc import Callable
from contextlib import contextmanager

Answer = Callable[[dict], tuple[int, dict, dict]]  # body -> (status, headers, JSON)


@contextmanager
def endpoint(answer: Answer):
    """The base URL, while the context lasts."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self._send(200, {}, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*answer(body))

        def _send(self, status, headers, value):
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            try:
                self.send_response(status)
                for name, text in {**headers, "Content-Type": "application/json", "Content-Length": len(data)}.items():
                    self.send_header(name, str(text))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client has gone

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def message(text: str, *calls: tuple[str, dict], tokens: tuple[int, int] = (50, 10)) -> tuple[int, dict, dict]:
    """An answer with a text and calls."""
    made = [
        {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for i, (name, arguments) in enumerate(calls)
    ]
    choice = {"message": {"role": "assistant", "content": text, "tool_calls": made or None}, "finish_reason": "stop"}
    return 200, {}, {"choices": [choice], "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}}
