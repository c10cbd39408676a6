"""The configuration files of vllm-plugin-FL and sglang-plugin-FL."""
