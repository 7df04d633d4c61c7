"""What a sweep is told by: verdict, report and plots."""
