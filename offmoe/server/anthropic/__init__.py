"""Anthropic's messages endpoints: requests checked, replies in their form. Knows prepared generations, no engine."""
