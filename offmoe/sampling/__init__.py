"""From logits to a token: settings, rules, log probabilities. Knows logits and ids, no text and no engine."""
