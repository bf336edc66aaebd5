import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # before the first import of Keras, wherever that is
