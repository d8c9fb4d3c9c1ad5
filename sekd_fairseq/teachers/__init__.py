"""Running a teacher: for a cache (torch or vLLM, cut by a truncation), or beside the student."""
