"""The demo: the whole way on loopback, with a real model and a simulated TEE."""
