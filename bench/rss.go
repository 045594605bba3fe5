package bench

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
)

// ProcessRSS is the resident memory of a process in bytes.
func ProcessRSS(pid int) (int64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0, err
	}
	parts := strings.Fields(string(raw))
	if len(parts) < 2 {
		return 0, fmt.Errorf("read /proc/%d/statm: got %q", pid, raw)
	}
	pages, err := strconv.ParseInt(parts[1], 10, 64)
	return pages * int64(os.Getpagesize()), err
}

// rss is the server's resident memory in bytes: of its process where that is
// known, else as /metrics says.
func (r *loadRun) rss(ctx context.Context) (int64, error) {
	if r.o.RSS != nil {
		return r.o.RSS()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(r.o.URL, "/")+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	if r.o.Token != "" {
		req.Header.Set("Authorization", "Bearer "+r.o.Token)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	for s := bufio.NewScanner(res.Body); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), "process_resident_memory_bytes "); ok {
			v, err := strconv.ParseFloat(rest, 64)
			return int64(v), err
		}
	}
	return 0, fmt.Errorf("GET /metrics: status %d, no process_resident_memory_bytes", res.StatusCode)
}
