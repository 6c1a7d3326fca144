"""An OpenAI-compatible HTTP server.

- `protocol`: the bodies of requests, their limits, and the options that they mean.
- `rows`, `reading`, `cache`: a text while it is written, prompts while they are read, the keys and values of all.
- `engine`, `steps`: the thread that writes the texts of a model, one after another or together.
- `jobs`: from a request to the rows that answer it, and back to the event loop.
- `replies`: what goes back, whole or as a stream.
- `guard`: key, host, places and time limits of every request.
- `app`: the routes. `server`: from a free port to the last reply. `page.html`: a page to try the models on.
- `vllm`: hand a model to vLLM.
"""
