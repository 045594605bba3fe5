package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"

	"trainerd/secloop/field"
)

// version is set by the linker (-X main.version=...).
var version = "dev"

// engineVersion names what a checkpoint was written by.
func engineVersion() string {
	if version != "dev" {
		return "trainerd " + version
	}
	if bi, ok := debug.ReadBuildInfo(); ok {
		for _, s := range bi.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				return "trainerd dev " + s.Value[:12]
			}
		}
	}
	return "trainerd dev"
}

// exitError ends the process with a status of its own, its text already printed.
type exitError struct{ code int }

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", e.code) }

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "trainerd",
		Short:         "Train LLM policies by reinforcement learning from Arrow rollouts over HTTP",
		Version:       engineVersion(),
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().Bool("json", false, "log JSON lines to stderr instead of text and progress bars")
	root.AddCommand(newServe(), newImport(), newInit(), newInspect(), newPull(), newDemo(), newBench(), newToken(), newSecloop())
	return root
}

// takes refuses a command line with fewer or, unless most is negative, more
// arguments, and says which the command has.
func takes(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < least || most >= 0 && len(args) > most {
			return fmt.Errorf("arguments: got %d, expected: %s", len(args), cmd.UseLine())
		}
		return nil
	}
}

func main() {
	field.Main() // a battle-field starts this executable again for its workers
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	go func() {
		<-ctx.Done()
		stop() // a second signal ends the process at once
	}()
	if err := newRoot().ExecuteContext(ctx); err != nil {
		var exit exitError
		if errors.As(err, &exit) {
			os.Exit(exit.code)
		}
		fmt.Fprintln(os.Stderr, "trainerd:", err)
		os.Exit(1)
	}
}
