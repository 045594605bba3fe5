package storage

import (
	"fmt"
	"strconv"
	"strings"

	"trainerd/internal/fault"
)

// Layout of a job's checkpoints:
//
//	jobs/{job}/latest.json                                   the newest committed one, moved by compare-and-swap
//	jobs/{job}/checkpoints/{step:08d}-{attempt}/claim.json   first object: the prefix is taken, for ever
//	jobs/{job}/checkpoints/{step:08d}-{attempt}/hf/...       a Hugging Face directory and nothing else
//	jobs/{job}/checkpoints/{step:08d}-{attempt}/state/...    with snapshots: optimizer, RNG, step record
//	jobs/{job}/checkpoints/{step:08d}-{attempt}/manifest.json   last object: the checkpoint exists

// CheckJob refuses names that cannot be one element of a key.
func CheckJob(job string) error {
	ok := len(job) >= 1 && len(job) <= 128 && job[0] != '.'
	for i := 0; ok && i < len(job); i++ {
		c := job[i]
		ok = c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.'
	}
	if !ok {
		return fault.BadField("job", fmt.Sprintf("%.140q", job), "1 to 128 letters, digits, '-', '_' and '.', not beginning with '.'")
	}
	return nil
}

func checkpointsOf(job string) string { return "jobs/" + job + "/checkpoints/" }

func latestKey(job string) string { return "jobs/" + job + "/latest.json" }

func stepPrefix(job string, step int64) string {
	return fmt.Sprintf("%s%08d-", checkpointsOf(job), step)
}

func prefixOf(job string, step int64, attempt int) string {
	return stepPrefix(job, step) + strconv.Itoa(attempt)
}

// parsePrefix reads "{step:08d}-{attempt}" as prefixOf writes it.
func parsePrefix(name string) (step int64, attempt int, ok bool) {
	s, a, found := strings.Cut(name, "-")
	if !found {
		return 0, 0, false
	}
	step, err := strconv.ParseInt(s, 10, 64)
	if err != nil || step < 0 || fmt.Sprintf("%08d", step) != s {
		return 0, 0, false
	}
	attempt, err = strconv.Atoi(a)
	if err != nil || attempt < 0 || strconv.Itoa(attempt) != a {
		return 0, 0, false
	}
	return step, attempt, true
}
