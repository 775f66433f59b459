"""Pictures of plans: for a terminal, a browser and a trace viewer.

text      one line of characters per rank
html      a page that holds everything it needs: timeline, memory, critical path, bound, and a measured run beside
chrome    a trace file for Perfetto or chrome://tracing
course    what all of them read off a simulated step: messages, who waited for whom, memory over time
"""
