package field

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of one battle-field where control groups (version 1) can be written;
// elsewhere only the worker's rlimits hold.
const (
	maxTasks  = 256
	maxMemory = 512 << 20
)

const groupParent = "trainerd-field"

// cgroups are the controllers that a battle-field is put under, by root folder.
type cgroups map[string]struct{ file, value string }

// openCgroups finds the writable controllers and removes what a supervisor that
// was killed has left: a group is named after the process that made it.
func openCgroups() cgroups {
	g := cgroups{}
	for controller, limit := range map[string]struct{ file, value string }{
		"pids":   {"pids.max", strconv.Itoa(maxTasks)},
		"memory": {"memory.limit_in_bytes", strconv.Itoa(maxMemory)},
	} {
		root := filepath.Join("/sys/fs/cgroup", controller, groupParent)
		if err := os.Mkdir(root, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			continue
		}
		g[root] = limit
		old, _ := filepath.Glob(filepath.Join(root, "*-*"))
		for _, dir := range old {
			owner, _, _ := strings.Cut(filepath.Base(dir), "-")
			if pid, err := strconv.Atoi(owner); err == nil && unix.Kill(pid, 0) == unix.ESRCH {
				remove(dir)
			}
		}
	}
	return g
}

// enter puts a worker that was just started into a new group of each controller.
func (g cgroups) enter(pid int) string {
	name := fmt.Sprintf("%d-%d", os.Getpid(), pid)
	for root, limit := range g {
		dir := filepath.Join(root, name)
		if os.Mkdir(dir, 0o755) != nil {
			continue
		}
		os.WriteFile(filepath.Join(dir, limit.file), []byte(limit.value), 0)
		os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
	}
	return name
}

// leave removes a dead worker's groups; the last of its processes may take a moment to go.
func (g cgroups) leave(name string) {
	for root := range g {
		remove(filepath.Join(root, name))
	}
}

// remove waits for the last of a group's processes to be gone.
func remove(dir string) {
	for range 2000 {
		if err := os.Remove(dir); err == nil || errors.Is(err, os.ErrNotExist) {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// close removes the parents unless another supervisor uses them.
func (g cgroups) close() {
	for root := range g {
		os.Remove(root)
	}
}
