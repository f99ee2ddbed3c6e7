"""What happens to experts before and after training: imported, added, taken out, exported, found in unlabelled data."""
