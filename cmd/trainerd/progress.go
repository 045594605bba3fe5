package main

import (
	"context"
	"io"
	"log/slog"
	"os"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// console is where a command talks to a person: results to stdout, the rest to
// stderr as text with progress bars on a terminal, as JSON lines with --json.
type console struct {
	out  io.Writer
	log  *slog.Logger
	bars bool
}

func newConsole(cmd *cobra.Command) console {
	asJSON, _ := cmd.Flags().GetBool("json")
	c := console{out: cmd.OutOrStdout()}
	if asJSON {
		c.log = slog.New(slog.NewJSONHandler(cmd.ErrOrStderr(), nil))
		return c
	}
	c.log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
	c.bars = term.IsTerminal(int(os.Stderr.Fd()))
	return c
}

// bar returns a progress bar of n units, silent when stderr is no terminal.
func (c console) bar(n int64, what string) *progressbar.ProgressBar {
	if !c.bars {
		return progressbar.NewOptions64(n, progressbar.OptionSetVisibility(false))
	}
	return progressbar.NewOptions64(n, progressbar.OptionSetWriter(os.Stderr), progressbar.OptionSetDescription(what),
		progressbar.OptionShowCount(), progressbar.OptionClearOnFinish(), progressbar.OptionThrottle(100e6))
}

// sinkWithProgress reports files as they are written.
func (c console) sinkWithProgress(sink func(context.Context, string, func(io.Writer) error) error, total int64) func(context.Context, string, func(io.Writer) error) error {
	b := c.bar(total, "writing")
	return func(ctx context.Context, name string, write func(io.Writer) error) error {
		err := sink(ctx, name, func(w io.Writer) error { return write(io.MultiWriter(w, b)) })
		if err == nil {
			c.log.Info("wrote", "file", name)
		}
		return err
	}
}
