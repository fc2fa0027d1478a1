"""Commands over an engine: answers to prompts, and a conversation. docs/command-line.md has their use."""
