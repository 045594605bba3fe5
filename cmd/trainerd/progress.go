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
	err  io.Writer
	log  *slog.Logger
	bars bool
}

func newConsole(cmd *cobra.Command) console { return newQuietConsole(cmd, slog.LevelInfo) }

// newQuietConsole logs from the given level on.
func newQuietConsole(cmd *cobra.Command, level slog.Level) console {
	asJSON, _ := cmd.Flags().GetBool("json")
	o := &slog.HandlerOptions{Level: level}
	c := console{out: cmd.OutOrStdout(), err: cmd.ErrOrStderr()}
	if asJSON {
		c.log = slog.New(slog.NewJSONHandler(c.err, o))
		return c
	}
	c.log = slog.New(slog.NewTextHandler(c.err, o))
	f, ok := c.err.(*os.File)
	c.bars = ok && term.IsTerminal(int(f.Fd()))
	return c
}

// bar returns a progress bar of n units, silent when stderr is no terminal.
func (c console) bar(n int64, what string) *progressbar.ProgressBar {
	if !c.bars {
		return progressbar.NewOptions64(n, progressbar.OptionSetVisibility(false))
	}
	return progressbar.NewOptions64(n, progressbar.OptionSetWriter(c.err), progressbar.OptionSetDescription(what),
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
