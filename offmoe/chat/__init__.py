"""Messages to prompt ids through a model's chat template, and conversations as files. Knows tokenizers, no engine."""
