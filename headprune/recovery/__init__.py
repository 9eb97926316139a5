"""Fine-tuning, distillation and rewinding after the cut."""
