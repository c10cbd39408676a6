"""vllm-plugin-FL's dispatch file."""
