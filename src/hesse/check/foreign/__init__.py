"""Functions that are not torch's: of NumPy arrays with a gradient of their own, of JAX and TensorFlow."""
