"""HTTP: OpenAI's and Anthropic's endpoints, the queue before the engine, a web page. Knows the engine's front door."""
