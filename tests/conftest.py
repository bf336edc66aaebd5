import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # before the first import of Keras, wherever that is
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # tests leave nothing in the user's cache
