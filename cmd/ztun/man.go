package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

func manCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use: "man", Short: "print the manual page, or write those of all commands", Args: noArgs,
		Long: "Prints the manual page of ztun in man's own format, or writes one page for each command to a directory:\n\n" +
			"  ztun man | man -l -\n" +
			"  ztun man --out /usr/local/share/man/man1",
		RunE: func(cmd *cobra.Command, _ []string) error {
			root := manTree()
			if dir == "" {
				text, err := page(root)
				if err == nil {
					_, err = cmd.OutOrStdout().Write(text)
				}
				return err
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
			return writePages(root, dir)
		},
	}
	cmd.Flags().StringVar(&dir, "out", "", "directory to write ztun.1, ztun-proxy.1, ztun-pod-list.1 and so on to")
	return cmd
}

// manTree is the program's commands as the manual has them: what their help indents is set as it stands, and nothing
// but the program's version decides what is written.
func manTree() *cobra.Command {
	root := rootCommand()
	root.DisableAutoGenTag = true
	var each func(*cobra.Command)
	each = func(cmd *cobra.Command) {
		lines := strings.Split(cmd.Long, "\n")
		for i, l := range lines {
			if strings.HasPrefix(l, "  ") {
				lines[i] = "    " + l // a block of code in Markdown, of which the page is made
			}
		}
		cmd.Long = strings.Join(lines, "\n")
		for _, sub := range cmd.Commands() {
			each(sub)
		}
	}
	each(root)
	return root
}

// page makes the manual page of one command.
func page(cmd *cobra.Command) ([]byte, error) {
	version, _ := buildVersion()
	undated := time.Time{}
	var b bytes.Buffer
	if err := doc.GenMan(cmd, &doc.GenManHeader{
		Title: strings.ToUpper(pageName(cmd)), Section: "1", Source: "ztun " + version, Manual: "ztun", Date: &undated,
	}, &b); err != nil {
		return nil, err
	}
	// No date: today's would make each build another one.
	return bytes.Replace(b.Bytes(), []byte(undated.Format("Jan 2006")), nil, 1), nil
}

func pageName(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

// writePages writes the page of each command that somebody may call.
func writePages(cmd *cobra.Command, dir string) error {
	if cmd.Name() == "help" || !cmd.IsAvailableCommand() && cmd.HasParent() {
		return nil
	}
	text, err := page(cmd)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, pageName(cmd)+".1"), text, 0o644)
	}
	if err != nil {
		return fmt.Errorf("the page of %s: %w", cmd.CommandPath(), err)
	}
	for _, sub := range cmd.Commands() {
		if err := writePages(sub, dir); err != nil {
			return err
		}
	}
	return nil
}
