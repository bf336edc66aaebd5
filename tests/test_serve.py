"""A net behind HTTP: what it answers, and what it refuses."""

import dataclasses
import io
import threading
import time

import numpy as np
import pytest
import served
import tiny
from PIL import Image

from jaxft import serve, task


def trained(goal=None, classes=tiny.CLASSES):
    return dataclasses.replace(tiny.model(), task=goal or task.classification(), classes=classes, image_size=(8, 8))


def png(seed=0):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def client(model, **settings):
    from starlette.testclient import TestClient

    return TestClient(serve.app(model, **settings))


def test_it_answers_what_the_model_predicts():
    """Bug: another preprocessing, another order of classes, or a form that is read as an image."""
    made = trained()
    asked = client(made)
    expected = dict(zip(tiny.CLASSES, made.predict([png()]).outputs[0].tolist(), strict=True))
    bare = asked.post("/predict", content=png())
    form = asked.post("/predict", files={"file": ("a.png", png(), "image/png")})
    assert bare.status_code == form.status_code == 200
    assert bare.json() == form.json()
    assert bare.json()["outputs"] == pytest.approx(expected)
    assert bare.json()["prediction"] == max(expected, key=expected.get) == next(iter(bare.json()["outputs"]))


def test_labels_and_values():
    """Bug: several labels are answered by the likeliest alone."""
    labels = client(trained(task.multilabel(1e-6))).post("/predict", content=png()).json()
    assert labels["prediction"] == list(tiny.CLASSES)
    values = client(trained(task.regression())).post("/predict", content=png()).json()
    assert values["prediction"] == values["outputs"] and set(values["outputs"]) == set(tiny.CLASSES)


@pytest.mark.parametrize("data", [b"", b"<script>", b"\xff\xd8\xff\xe0", png()[:60]])
def test_what_is_no_image(data):
    """Bug: status 500, and a traceback in the log of a service."""
    found = client(trained()).post("/predict", content=data)
    assert found.status_code == 400 and found.json()["error"].startswith("the upload")


def test_size_limit():
    """Bug: an upload of gigabytes is kept in memory, whatever its header says."""
    asked = client(trained(), max_bytes=1000)
    assert asked.post("/predict", content=bytes(1001)).status_code == 413
    assert asked.post("/predict", content=(bytes(600) for _ in range(3))).status_code == 413


def test_pages():
    """Bug: the page needs something from elsewhere, or a name of a class is markup."""
    asked = client(trained(classes=("<b>", "x", "y")))
    page = asked.get("/")
    assert page.status_code == 200 and "<b>" not in page.text and "http" not in page.text
    assert asked.get("/health").json()["status"] == "ok"
    assert asked.get("/predict").status_code == 405 and asked.get("/../etc/passwd").status_code == 404


def test_an_untrained_model_is_refused():
    """Bug: every request fails."""
    with pytest.raises(ValueError, match="was not trained"):
        serve.app(tiny.model())


def test_a_real_server(monkeypatch):
    """Bug: it listens on every address, or does not start."""
    import urllib.request

    import uvicorn

    seen = {}

    def run(app, **settings):
        seen.update(settings)
        seen["server"] = server = uvicorn.Server(uvicorn.Config(app, **{**settings, "log_level": "error"}))
        server.run()

    monkeypatch.setattr(uvicorn, "run", run)
    port = served.free_port()
    thread = threading.Thread(target=serve.serve, args=(trained(),), kwargs={"port": port})
    thread.start()
    while not (seen.get("server") and seen["server"].started):
        time.sleep(0.05)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/predict", png(), timeout=60) as answer:
        status = answer.status
    seen["server"].should_exit = True
    thread.join(20)
    assert seen["host"] == "127.0.0.1" and status == 200 and not thread.is_alive()
