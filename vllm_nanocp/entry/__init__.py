# SPDX-License-Identifier: Apache-2.0
"""What happens before an engine starts: flags, refusals, the finished configuration, and what front-ends are told."""
