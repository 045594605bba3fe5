package cpu

import (
	"bufio"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
)

// HostMemory returns the bytes of memory that this process may ever have, and
// those it could still take now, within the limits of its control groups.
func HostMemory() (total, free int64) { return hostMemory() }

// hostMemory returns the bytes of memory this process may ever have, and those
// it can have now: the least of the machine, the cgroups above it and GOMEMLIMIT.
func hostMemory() (total, free int64) {
	total, free = meminfo("/proc/meminfo")
	for _, g := range cgroups("/proc/self/cgroup", "/sys/fs/cgroup") {
		limit, used, ok := g.read()
		if ok {
			total = min(total, limit)
			free = min(free, limit-used)
		}
	}
	if limit := debug.SetMemoryLimit(-1); limit < math.MaxInt64 {
		total = min(total, limit)
	}
	return total, max(free, 0)
}

// meminfo reads MemTotal and MemAvailable; a system without them counts as unlimited.
func meminfo(path string) (total, available int64) {
	total, available = math.MaxInt64, math.MaxInt64
	f, err := os.Open(path)
	if err != nil {
		return total, available
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) < 2 {
			continue
		}
		kib, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			continue
		}
		switch fields[0] {
		case "MemTotal:":
			total = kib << 10
		case "MemAvailable:":
			available = kib << 10
		}
	}
	return total, available
}

// cgroup names the files of one control group (version 2 or 1).
type cgroup struct {
	dir                 string
	limit, usage, cache string // cache: the key in memory.stat of file pages that can be dropped
}

// cgroups lists the memory groups of the process, innermost first, up to the root.
func cgroups(self, root string) []cgroup {
	text, err := os.ReadFile(self)
	if err != nil {
		return nil
	}
	var out []cgroup
	for _, line := range strings.Split(strings.TrimSpace(string(text)), "\n") {
		part := strings.SplitN(line, ":", 3) // id:controllers:path
		if len(part) != 3 {
			continue
		}
		g, top := cgroup{limit: "memory.max", usage: "memory.current", cache: "inactive_file"}, root
		switch {
		case part[0] == "0" && part[1] == "": // version 2
		case strings.Contains(","+part[1]+",", ",memory,"):
			g, top = cgroup{limit: "memory.limit_in_bytes", usage: "memory.usage_in_bytes", cache: "total_inactive_file"}, filepath.Join(root, "memory")
		default:
			continue
		}
		for path := filepath.Clean("/" + part[2]); ; path = filepath.Dir(path) {
			g.dir = filepath.Join(top, path)
			out = append(out, g)
			if path == "/" {
				break
			}
		}
	}
	return out
}

// read returns the limit and what of it is in use and cannot be dropped.
func (g cgroup) read() (limit, used int64, ok bool) {
	limit, ok = number(filepath.Join(g.dir, g.limit))
	if !ok || limit >= 1<<60 { // version 1 writes "no limit" as a huge number
		return 0, 0, false
	}
	used, ok = number(filepath.Join(g.dir, g.usage))
	if !ok {
		return 0, 0, false
	}
	stat, err := os.ReadFile(filepath.Join(g.dir, "memory.stat"))
	if err == nil {
		for _, line := range strings.Split(string(stat), "\n") {
			if rest, found := strings.CutPrefix(line, g.cache+" "); found {
				if v, err := strconv.ParseInt(rest, 10, 64); err == nil {
					used -= min(v, used)
				}
			}
		}
	}
	return limit, used, true
}

// number reads a file that holds one integer; "max" and absence are not numbers.
func number(path string) (int64, bool) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	v, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	return v, err == nil
}

// processorName returns what the processor calls itself.
func processorName() string {
	f, err := os.Open("/proc/cpuinfo")
	if err == nil {
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			if name, value, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(name) == "model name" {
				return strings.TrimSpace(value)
			}
		}
	}
	return runtime.GOARCH
}
