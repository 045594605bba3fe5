package field

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"trainerd/secloop/blue"
	"trainerd/secloop/scenario"
)

// redisServer is where Debian puts it.
const redisServer = "/usr/bin/redis-server"

const redisStart = 20 * time.Second // a start takes 20 ms where nothing else runs

// redis is a real data store of one host, in blue's namespace and as blue's
// user, without blue's capabilities. It keeps nothing: its folder is the worker's small tmpfs.
type redis struct {
	host scenario.Host
	cmd  *exec.Cmd
}

// startStores starts one for each host that is a store, with what there is to
// steal on the target, and the folders that a careless administrator has left writable.
func startStores(ep scenario.Episode) (map[string]blue.Program, error) {
	for _, dir := range []string{"/tmp/admin/.ssh", "/tmp/spool/cron", "/tmp/cron.d"} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	// Capabilities that are inherited belong to the thread that starts a child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("drop inherited capabilities: %w", err)
	}
	all := map[string]blue.Program{}
	for _, h := range scenario.Hosts() {
		if h.Service != scenario.Store {
			continue
		}
		r := &redis{host: h}
		r.cmd = exec.Command(redisServer, "--bind", h.Addr.String(), "--port", fmt.Sprint(h.Port), "--dir", "/tmp", "--dbfilename", h.Name+".rdb",
			"--save", "", "--appendonly", "no", "--protected-mode", "no", "--enable-protected-configs", "yes", "--maxclients", "100", "--maxmemory", "16mb")
		r.cmd.Env = []string{}
		if err := r.cmd.Start(); err != nil {
			return nil, fmt.Errorf("start store of %s: %w", h.Name, err)
		}
		secret := "nothing here"
		if h.Name == ep.Target.Name {
			secret = ep.Secret
		}
		var err error
		for end := time.Now().Add(redisStart); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
			if err = r.ask("SET records \""+secret+"\"", "+OK"); err == nil {
				break
			}
		}
		if err != nil {
			return nil, fmt.Errorf("start store of %s: %w", h.Name, err)
		}
		all[h.Name] = r
	}
	return all, nil
}

// ask sends one command on a connection of its own and expects how the answer begins.
func (r *redis) ask(command, expect string) error {
	c, err := net.DialTimeout("tcp4", r.host.At().String(), patience)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, command+"\n"); err != nil {
		return err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	if !strings.HasPrefix(line, expect) {
		return fmt.Errorf("store answers %.60q to %.40q, expected %s", line, command, expect)
	}
	return nil
}

// Set implements blue.Program: the password is set and an anonymous client must be turned away.
func (r *redis) Set(setting string) error {
	if setting != scenario.RequireAuth {
		return nil
	}
	err := r.ask("CONFIG SET requirepass "+blue.StorePassword, "+OK")
	if err != nil && r.ask("PING", "-NOAUTH") != nil { // set before
		return err
	}
	return r.ask("PING", "-NOAUTH")
}

// Stop implements blue.Program.
func (r *redis) Stop() {
	if err := r.cmd.Process.Kill(); err == nil || errors.Is(err, os.ErrProcessDone) {
		r.cmd.Wait()
	}
}
