"""The process beside an engine that takes the policy's versions while the engine samples."""
