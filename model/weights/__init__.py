"""Reading and writing weights and adapters in the formats of Hugging Face and peft."""
