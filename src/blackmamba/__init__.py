"""BlackMamba: language models that alternate Mamba state-space layers with routed experts."""
