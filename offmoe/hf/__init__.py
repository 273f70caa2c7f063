"""transformers' doors: modules, names, tokenizers, adapters. The one room that knows how transformers is made."""
