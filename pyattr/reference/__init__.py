"""The definitions: plain PyTorch, float64-capable, no tricks. Also the backend "reference"."""
