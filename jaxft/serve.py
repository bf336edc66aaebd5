"""A trained net behind HTTP: a page to try it, and JSON for programs. One process, one prediction at a time."""

import html
import importlib
import json
import threading
from typing import Any

from jaxft.model import Model

MAX_BYTES = 32 * 2**20  # of an upload

PAGE = """\
<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{title}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:40rem;margin:2rem auto;padding:0 1rem}}
img{{max-width:100%;max-height:20rem}}td{{padding-right:1rem}}</style>
<h1>{title}</h1><p>{about}</p><input type="file" id="file" accept="image/*"><p><img id="image" alt=""><p id="error">
<table id="found"></table>
<script>
const at = id => document.getElementById(id);
at("file").onchange = async () => {{
  const file = at("file").files[0];
  at("image").src = URL.createObjectURL(file);
  at("found").textContent = at("error").textContent = "";
  const answer = await fetch("predict", {{method: "POST", body: file}});
  const found = await answer.json();
  if (!answer.ok) {{ at("error").textContent = found.error; return; }}
  for (const [name, value] of Object.entries(found.outputs)) {{
    const row = at("found").insertRow();
    row.insertCell().textContent = name;
    row.insertCell().textContent = value.toPrecision(3);
  }}
}};
</script></html>
"""


def app(model: Model, max_bytes: int = MAX_BYTES) -> Any:
    """The application, for any ASGI server.

    `POST /predict` takes the bytes of an image, or a form with a file, and answers {"prediction", "outputs": name →
    number}: the likeliest class, the labels above their threshold, or the values. `GET /` is a page to try it,
    `GET /health` answers {"status": "ok"}. An upload that is no image is answered by 400, a larger one than `max_bytes`
    by 413, each with {"error"}. Nothing of an upload is written to disk or run.

    Raises:
        ValueError: the model was not trained, or the packages are missing.
    """
    if model.task is None:
        raise ValueError("this model was not trained, so that it predicts nothing; give that of a run")
    try:
        applications: Any = importlib.import_module("starlette.applications")
        responses: Any = importlib.import_module("starlette.responses")
        routing: Any = importlib.import_module("starlette.routing")
        threads: Any = importlib.import_module("starlette.concurrency")
    except ImportError as error:
        raise ValueError("serving needs starlette and uvicorn: pip install 'jaxft[serve]'") from error
    task, one_at_a_time = model.task, threading.Lock()

    def answer(data: bytes) -> dict[str, Any]:
        with one_at_a_time:
            outputs = model.predict([data]).outputs[0].tolist()
        named = dict(zip(model.classes, outputs, strict=True))
        if task.name == "classification":
            ranked = dict(sorted(named.items(), key=lambda pair: -pair[1]))
            return {"prediction": next(iter(ranked)), "outputs": ranked}
        if task.name == "regression":
            return {"prediction": named, "outputs": named}
        limits = task.options.get("threshold", 0.5)
        limits = limits if isinstance(limits, list | tuple) else [limits] * len(outputs)
        above = [name for (name, value), limit in zip(named.items(), limits, strict=True) if value > limit]
        return {"prediction": above, "outputs": named}

    def refused(status: int, why: str) -> Any:
        return responses.JSONResponse({"error": why}, status)

    async def predict(request: Any) -> Any:
        data = b""
        async for chunk in request.stream():  # counted as it comes, as a header can lie
            data += chunk
            if len(data) > max_bytes:
                return refused(413, f"the upload has more than {max_bytes:,} bytes; send a smaller image")
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            data = _file_of_form(request.headers["content-type"], data)
        try:
            return responses.JSONResponse(await threads.run_in_threadpool(answer, data))
        except ValueError as error:
            return refused(400, str(error).replace("image 0 ", "the upload "))

    async def page(request: Any) -> Any:
        about = f"{model.name or 'A net'} for {len(model.classes)} outputs; choose an image."
        return responses.HTMLResponse(PAGE.format(title="jaxft", about=html.escape(about)))

    async def health(request: Any) -> Any:
        return responses.JSONResponse({"status": "ok", "classes": json.loads(json.dumps(list(model.classes)))})

    routes = [("/", page, "GET"), ("/health", health, "GET"), ("/predict", predict, "POST")]
    return applications.Starlette(routes=[routing.Route(path, act, methods=[how]) for path, act, how in routes])


def _file_of_form(kind: str, data: bytes) -> bytes:
    """The first file of a form, by Python's own parser of such messages; b"" if there is none."""
    import email.parser
    import email.policy

    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(
        f"Content-Type: {kind}\r\n\r\n".encode() + data
    )
    files = [part.get_payload(decode=True) for part in message.iter_parts() if part.get_filename()]
    return files[0] if files and isinstance(files[0], bytes) else b""


def serve(model: Model, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serves until it is stopped; by default for this machine alone.

    Raises:
        ValueError: as `app`.
    """
    made = app(model)
    try:
        uvicorn: Any = importlib.import_module("uvicorn")
    except ImportError as error:
        raise ValueError("serving needs uvicorn: pip install 'jaxft[serve]'") from error
    uvicorn.run(made, host=host, port=port, workers=1, log_level="info")
