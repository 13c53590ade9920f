package harness

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	stopLimit = 20 * time.Second
	logTail   = 12_000
)

// Process is a server of the test. It ends with the test, and shows its log if the test failed.
type Process struct {
	t       testing.TB
	name    string
	log     string
	command *exec.Cmd
	exited  chan struct{}
	failure error // how it exited; read only once exited is closed
	stop    sync.Once
}

// StartProcess runs a program with the test's environment and env, its output in <dir>/<name>.log.
func StartProcess(t testing.TB, dir, name string, env []string, program string, args ...string) *Process {
	t.Helper()
	p := &Process{t: t, name: name, log: filepath.Join(dir, name+".log"), exited: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()

	p.command = exec.Command(program, args...)
	p.command.Env = append(os.Environ(), env...)
	p.command.Dir = dir
	p.command.Stdout, p.command.Stderr = log, log
	// Should this test binary be killed, its servers must not live on.
	p.command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.command.Start(); err != nil {
		t.Fatalf("%s does not start: %v", name, err)
	}
	go func() {
		p.failure = p.command.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.Stop()
		if t.Failed() {
			log := p.Log()
			t.Logf("the end of %s's log:\n%s", name, log[max(0, len(log)-logTail):])
		}
	})
	return p
}

// Stop asks the process to end, waits until it has, and returns how it ended (nil: exit code 0).
func (p *Process) Stop() error {
	p.stop.Do(func() {
		p.command.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.exited:
		case <-time.After(stopLimit):
			p.command.Process.Kill()
			<-p.exited
			p.t.Errorf("%s did not stop within %v of SIGTERM, and was killed", p.name, stopLimit)
		}
	})
	return p.failure
}

// Signal sends it a signal.
func (p *Process) Signal(signal os.Signal) {
	p.t.Helper()
	if err := p.command.Process.Signal(signal); err != nil {
		p.t.Fatalf("%s: %v", p.name, err)
	}
}

// Log is all that processes of this name have written in the test.
func (p *Process) Log() string {
	content, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(content)
}

// Running returns an error if the process has ended.
func (p *Process) Running() error {
	select {
	case <-p.exited:
		return errors.New(p.name + " has ended by itself")
	default:
		return nil
	}
}
